"""Training checkpoints: everything that determines the next bits, and nothing else.

``checkpoint/step-00000500/`` holds ``progress.json`` and ``state.safetensors``. A checkpoint is written to a
temporary folder and then renamed, so a reader finds a complete one or none.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Progress:
    """Progress of a training; ``stream`` is the state of the data after the last batch used."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = field(default=None)


def save_state(folder: Path, members: Sequence[Member], progress: Progress) -> None:
    """Write a checkpoint, then remove the older ones."""
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-{progress.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"{m.name}/{key}": value for m in members for key, value in m.state().items()}
    with atomic_path(partial / "state.safetensors") as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
    write_json(partial / "progress.json", asdict(progress))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in folder.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def load_progress(folder: Path) -> Progress | None:
    """Return the progress of the newest checkpoint; None if there is none."""
    newest = _newest(folder)
    if newest is None:
        return None
    path = newest / "progress.json"
    try:
        return Progress(**read_json(path, "the checkpoint"))
    except (UserError, TypeError) as error:
        raise _damaged_error(path, error) from None


def load_members(folder: Path, members: Sequence[Member]) -> None:
    """Load weights and optimiser states of the newest checkpoint into the members."""
    newest = _newest(folder)
    if newest is None:
        raise UserError(f"the checkpoint folder must hold a checkpoint; {folder} holds none.")
    path = newest / "state.safetensors"
    try:
        tensors = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise _damaged_error(path, error) from None
    for member in members:
        prefix = f"{member.name}/"
        own: dict[str, torch.Tensor] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
        try:
            member.load_state(own)
        except UserError as error:
            raise _damaged_error(path, error) from None


def _damaged_error(path: Path, error: Exception) -> UserError:
    return UserError(f"the checkpoint {path} is damaged ({error}). Remove the run folder and start again.")


def _newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None
