"""Loading a saved SAE from wherever it is: a run folder, a folder of its own, or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from kronsae.core import checkpoint
from kronsae.core.sae import SAE
from kronsae.support.errors import UserError, nearest


def load(source: Path | str, name: str | None = None, *, device: torch.device | str = "cpu") -> SAE:
    """Load an SAE.

    Args:
        source: a run folder, a folder with ``cfg.json``, or ``"user/repo"`` on the Hub with either layout.
        name: which SAE of a run; may be left out where there is one only.
        device: where to put it.

    Raises:
        UserError: there is no such SAE, or its files are damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    if (folder / checkpoint.CONFIG_FILE).exists():
        if name not in (None, folder.name):
            raise UserError(f"{source} holds one SAE, not a run; leave name out (got '{name}').")
        return checkpoint.load(folder, device)
    names = sorted(path.parent.name for path in (folder / "saes").glob(f"*/{checkpoint.CONFIG_FILE}"))
    if not names:
        raise UserError(f"{source} holds no SAE: neither {checkpoint.CONFIG_FILE} nor a finished run's saes/ folder.")
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        hint = "" if name is None else nearest(name, names)
        raise UserError(f"name must be one of {', '.join(names)} for {source}; got {name!r}.{hint}")
    return checkpoint.load(folder / "saes" / name, device)


def _from_hub(repository: str) -> Path:
    if not _is_repository(repository):
        raise UserError(f"there is no folder {repository}, and it is no Hub name (user/repo) either. Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"'{repository}' is no local folder and could not be had from the Hugging Face Hub "
            f"({type(error).__name__}). Check the name, the network and your access."
        ) from None


def _is_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))
