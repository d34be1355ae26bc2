"""Loading of a saved SAE from a run folder, an SAE folder (ours or of another library) or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kronsae.core import checkpoint
from kronsae.core.sae import SAE
from kronsae.data.model import check_device
from kronsae.interop import formats
from kronsae.interop.formats.foreign import Foreign
from kronsae.runs.hub_download import download, hub_place
from kronsae.runs.sae_choice import RUN_FOLDER, choose, folders_below
from kronsae.support.errors import UserError

OWN_FORMAT = "kronsae"


def load(
    source: Path | str,
    name: str | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """Load a saved SAE.

    Args:
        source: a run folder, the folder of an SAE (ours, or in a format of `kronsae.interop.formats`), a folder that
            holds such folders, or ``"user/repo"`` on the Hub with any of these layouts; ``"user/repo/folder"`` (or
            ``"user/repo:folder"``) is the SAE in that folder. From the Hub only the config and the weights of the SAE
            are downloaded (`kronsae.runs.hub_download`), once; stderr says of which commit they are.
        name: name of an SAE of a run, or its folder below the source; optional if there is only one.
        revision: branch, tag or commit of a Hub repository; None: its default branch.
        device: device of the SAE.

    Raises:
        UserError: there is no such SAE or device, its files are damaged or ask for what is not supported, or they
            cannot be downloaded.
    """
    device = check_device(device)  # before anything is downloaded
    return read_sae(sae_folder(source, name, revision), device).sae


def sae_folder(source: Path | str, name: str | None = None, revision: str | None = None) -> Path:
    """Return the local folder of the SAE that `load` loads, after a download where one is needed."""
    folder = Path(source)
    if not folder.is_dir():
        return _from_hub(str(source), name, revision)
    if revision is not None:
        raise UserError(f"revision is for repositories of the Hub; got '{revision}' with the folder {source}.")
    if is_sae_folder(folder):
        if name not in (None, folder.name):
            raise UserError(f"name must be left out for {source}, the folder of a single SAE; got '{name}'.")
        return folder
    own = [f"{RUN_FOLDER}/{path.parent.name}" for path in (folder / RUN_FOLDER).glob(f"*/{checkpoint.CONFIG_FILE}")]
    folders = own or folders_below(folder)
    if not folders:
        raise UserError(
            f"{source} must hold an SAE; it has neither {checkpoint.CONFIG_FILE} nor a finished run's saes/ folder nor "
            "other folders with an SAE."
        )
    return folder / choose(folders, name, where=str(source), source=folder.as_posix())


def is_sae_folder(folder: Path) -> bool:
    """Return whether a folder holds a single SAE, by the names of its files."""
    return (folder / checkpoint.CONFIG_FILE).exists() or formats.recognize(folder) is not None


def read_sae(folder: Path, device: torch.device | str = "cpu") -> Foreign:
    """Read the SAE in a folder, with what its files state about it; here its format is decided.

    Raises:
        UserError: its files are damaged or ask for what is not supported.
    """
    if not checkpoint.is_own(folder) and formats.recognize(folder) is not None:
        return formats.read(folder, device)
    sae = checkpoint.load(folder, device)
    stated = checkpoint.read_config(folder).get("metadata")
    about: dict[str, Any] = stated if isinstance(stated, dict) else {}
    read, written = _hooks(about.get("hooks_read")), _hooks(about.get("hooks_written"))
    return Foreign(
        sae=sae,
        format=OWN_FORMAT,
        architecture=sae.config.architecture,
        model=name if isinstance(name := about.get("model_name"), str) else None,
        hook_read=read,
        hook_write=None if written == read else written,
        settings={key: about[key] for key in ("trained_as", "tokens") if isinstance(about.get(key), str | int)},
    )


def _hooks(names: object) -> str | None:
    listed = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return ",".join(names) if listed and isinstance(names, list) else None


def _from_hub(source: str, name: str | None, revision: str | None) -> Path:
    place = hub_place(source)
    if place is None:
        raise UserError(
            f"the source must be a folder or a Hub name (user/repo, or user/repo/folder); got {source}. Check the path."
        )
    repository, inside = place
    if inside and name not in (None, inside):
        raise UserError(f"name must be left out for {source}, which names the folder of an SAE; got '{name}'.")
    return download(repository, inside or name, revision).folder
