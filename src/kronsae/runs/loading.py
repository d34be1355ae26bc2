"""Loading of a saved SAE from a run folder, an SAE folder or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from kronsae.core import checkpoint
from kronsae.core.sae import SAE
from kronsae.support.errors import UserError, nearest


def load(source: Path | str, name: str | None = None, *, device: torch.device | str = "cpu") -> SAE:
    """Load a saved SAE.

    Args:
        source: a run folder, a folder with ``cfg.json``, or ``"user/repo"`` on the Hub with either layout.
        name: name of an SAE of a run; optional if the run has only one.
        device: device of the SAE.

    Raises:
        UserError: there is no such SAE, or its files are damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    if (folder / checkpoint.CONFIG_FILE).exists():
        if name not in (None, folder.name):
            raise UserError(f"name must be left out for {source}, the folder of a single SAE; got '{name}'.")
        return checkpoint.load(folder, device)
    names = sorted(path.parent.name for path in (folder / "saes").glob(f"*/{checkpoint.CONFIG_FILE}"))
    if not names:
        raise UserError(
            f"{source} must hold an SAE; it has neither {checkpoint.CONFIG_FILE} nor a finished run's saes/ folder."
        )
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        hint = "" if name is None else nearest(name, names)
        raise UserError(f"name must be one of {', '.join(names)} for {source}; got {name!r}.{hint}")
    return checkpoint.load(folder / "saes" / name, device)


def _from_hub(repository: str) -> Path:
    if not _is_repository(repository):
        raise UserError(f"the source must be a folder or a Hub name (user/repo); got {repository}. Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"'{repository}' must be a local folder or a Hub repository; there is no such folder, and the download "
            f"failed ({type(error).__name__}). Check the name, the network and your access."
        ) from None


def _is_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))
