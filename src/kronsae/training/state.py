"""Training checkpoints: everything that determines the next bits, and nothing else.

``checkpoint/step-00000500/`` holds ``progress.json`` and ``state.safetensors``. A checkpoint is written to a
temporary folder and then renamed, so a reader finds a complete one or none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, read_json, write_json
from kronsae.support.tensors import read_tensors
from kronsae.training.member import Member

STATE = "state.safetensors"
LAYOUT = "layout.json"
"""In a checkpoint of several processes (`kronsae.distributed.checkpoint`), which has no `STATE`."""


@dataclass(frozen=True)
class Progress:
    """Progress of a training; ``stream`` is the state of the data after the last batch used."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = field(default=None)


def save_state(folder: Path, members: Sequence[Member], progress: Progress) -> None:
    """Write a checkpoint, then remove the older ones."""
    with new_checkpoint(folder, progress) as partial:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state_of(members).items()}
        with atomic_path(partial / STATE) as temporary:
            save_file(tensors, temporary)


def state_of(members: Sequence[Member]) -> dict[str, torch.Tensor]:
    """Return all tensors of the members' states, by ``<member>/<name>``."""
    return {f"{member.name}/{key}": value for member in members for key, value in member.state().items()}


@contextmanager
def new_checkpoint(folder: Path, progress: Progress) -> Iterator[Path]:
    """Yield the folder for the tensors of a new checkpoint; it becomes the only one when the block ends."""
    final = folder / f"step-{progress.step:08d}"
    partial = partial_folder(folder, progress)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    write_json(partial / "progress.json", asdict(progress))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def is_sharded(folder: Path) -> bool:
    """Return whether several processes wrote the newest checkpoint."""
    return (newest_checkpoint(folder) / LAYOUT).exists()


def partial_folder(folder: Path, progress: Progress) -> Path:
    """Return the folder in which a checkpoint is written, before it gets its name."""
    return folder / f".partial-{progress.step:08d}"


def load_progress(folder: Path) -> Progress | None:
    """Return the progress of the newest checkpoint; None if there is none."""
    newest = _newest(folder)
    if newest is None:
        return None
    path = newest / "progress.json"
    try:
        return Progress(**read_json(path, "the checkpoint"))
    except (UserError, TypeError) as error:
        raise damaged_error(path, error) from None


def load_members(folder: Path, members: Sequence[Member]) -> None:
    """Load weights and optimiser states of the newest checkpoint into the members."""
    path = newest_checkpoint(folder) / STATE
    try:
        tensors = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise damaged_error(path, error) from None
    give_states(members, tensors, path)


def give_states(members: Sequence[Member], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Restore a result of `state_of`, read from ``path``."""
    for member in members:
        prefix = f"{member.name}/"
        own: dict[str, torch.Tensor] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
        try:
            member.load_state(own)
        except UserError as error:
            raise damaged_error(path, error) from None


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint.

    Raises:
        UserError: there is none.
    """
    newest = _newest(folder)
    if newest is None:
        raise UserError(f"the checkpoint folder must hold a checkpoint; {folder} holds none.")
    return newest


def damaged_error(path: Path, error: Exception) -> UserError:
    """Return the error for a checkpoint whose file ``path`` cannot be used."""
    return UserError(f"the checkpoint {path} is damaged ({error}). Remove the run folder and start again.")


def _newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None
