"""Loading of a saved SAE from a run folder, an SAE folder or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from kronsae.core import checkpoint
from kronsae.core.sae import SAE
from kronsae.runs.hub_download import download, is_repository
from kronsae.support.errors import UserError, nearest


def load(
    source: Path | str,
    name: str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """Load a saved SAE.

    Args:
        source: a run folder, a folder with ``cfg.json``, or ``"user/repo"`` on the Hub with either layout. From the
            Hub only the config and the weights of the SAE are downloaded (`kronsae.runs.hub_download`), once; stderr
            says of which commit they are.
        name: name of an SAE of a run, or its folder in a Hub repository; optional if there is only one.
        revision: branch, tag or commit of a Hub repository; None: its default branch.
        device: device of the SAE.

    Raises:
        UserError: there is no such SAE, its files are damaged, or they cannot be downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        if not is_repository(str(source)):
            raise UserError(f"the source must be a folder or a Hub name (user/repo); got {source}. Check the path.")
        return checkpoint.load(download(str(source), name, revision).folder, device)
    if revision is not None:
        raise UserError(f"revision is for repositories of the Hub; got '{revision}' with the folder {source}.")
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
