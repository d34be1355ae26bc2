"""Training checkpoints: everything that determines the next bits, and nothing else.

``checkpoint/step-00000500/`` holds ``state.safetensors`` and ``progress.json``, which contains the size and the SHA-256
of every other file of the checkpoint and a SHA-256 of itself. A checkpoint is written to a temporary folder and then
renamed, so a reader finds a complete one or none. The last two are kept: if a file of the newest is damaged, the
training continues from the one before, and repeats the steps between with the same bits.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, fingerprint, flush_folder, read_bytes, writable
from kronsae.support.sealed import unsealed, write_sealed
from kronsae.support.tensors import read_tensors
from kronsae.training.member import Member

STATE = "state.safetensors"
PROGRESS = "progress.json"
LAYOUT = "layout.json"
"""In a checkpoint of several processes (`kronsae.distributed.checkpoint`), which has no `STATE`."""


@dataclass(frozen=True)
class Progress:
    """Progress of a training.

    Args:
        step: steps taken.
        tokens: tokens trained on.
        seconds: time of the training so far.
        stream: state of the data after the last batch used.
        history: size and SHA-256 of the metrics up to this step (`JsonlSink.written`); None: not known.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stream: dict[str, Any] | None = field(default=None)
    history: dict[str, Any] | None = field(default=None)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written; made by `verified`."""

    folder: Path
    progress: Progress


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is being written.

    Args:
        folder: folder for its files.
        files: size and SHA-256 of each file in it, by name; the writer enters them.
    """

    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def save_state(folder: Path, members: Sequence[Member], progress: Progress) -> None:
    """Write a checkpoint; of the older ones, the newest is kept.

    Raises:
        UserError: the disk is full or cannot be written to; the older checkpoints are as before.
    """
    with new_checkpoint(folder, progress) as new:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state_of(members).items()}
        with atomic_path(new.folder / STATE) as temporary:
            save_file(tensors, temporary)
            new.files[STATE] = fingerprint(temporary)


def state_of(members: Sequence[Member]) -> dict[str, torch.Tensor]:
    """Return all tensors of the members' states, by ``<member>/<name>``."""
    return {f"{member.name}/{key}": value for member in members for key, value in member.state().items()}


@contextmanager
def new_checkpoint(folder: Path, progress: Progress) -> Iterator[NewCheckpoint]:
    """Yield a new checkpoint to write files into; it becomes the newest when the block ends.

    The newest of the earlier ones stays, all others go before anything is written: there is room for two on the disk.
    """
    final = checkpoint_folder(folder, progress.step)
    partial = partial_folder(folder, progress)
    try:
        with writable(final):
            _make_room(folder, progress.step)
            partial.mkdir(parents=True)
        new = NewCheckpoint(partial)
        yield new
        write_sealed(partial / PROGRESS, asdict(progress) | {"files": new.files})
        with writable(final):
            flush_folder(partial)
            partial.rename(final)
            flush_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what is left of it may have filled the disk
        raise


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after so many steps."""
    return folder / f"step-{step:08d}"


def partial_folder(folder: Path, progress: Progress) -> Path:
    """Return the folder in which a checkpoint is written, before it gets its name."""
    return folder / f".partial-{progress.step:08d}"


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """Return the newest checkpoint that is not damaged; None if there is none at all.

    Args:
        folder: folder of the checkpoints.
        say: receives a line that names what is damaged, if an older checkpoint is returned.

    Raises:
        UserError: all are damaged; it names the file.
    """
    damages: list[UserError] = []
    for path in reversed(_by_step(folder)):
        try:
            found = verified(path)
        except UserError as error:
            damages.append(error)
            continue
        for damage in damages:
            reason = str(damage).removesuffix(START_AGAIN)
            say(f"Warning: {reason} The training continues from the one before it, {path.name}.")
        return found
    if damages:
        raise damages[0]
    return None


def verified(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder, after comparing every byte of it with what was written.

    Raises:
        UserError: a file is missing or damaged; it names the file.
    """
    content = read_bytes(path / PROGRESS, "the checkpoint")
    fields = unsealed(content)
    if fields is None:
        return Checkpoint(path, _without_checksums(path / PROGRESS, content))
    files = fields.pop("files")
    for name, expected in files.items():
        try:
            found = fingerprint(path / name)
        except OSError as error:
            raise damaged_error(path / name, error.strerror or str(error)) from None
        if found["bytes"] != expected["bytes"]:
            raise damaged_error(path / name, f"it has {found['bytes']:,} bytes instead of {expected['bytes']:,}")
        if found != expected:
            raise damaged_error(path / name, f"its SHA-256 is not the one in {PROGRESS}")
    try:
        return Checkpoint(path, Progress(**fields))
    except TypeError as error:
        raise damaged_error(path / PROGRESS, error) from None


def load_members(checkpoint: Checkpoint, members: Sequence[Member]) -> None:
    """Load weights and optimiser states of a checkpoint of a single process into the members."""
    path = checkpoint.folder / STATE
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


START_AGAIN = " Remove the run folder and start again."


def damaged_error(path: Path, reason: object) -> UserError:
    """Return the error for a checkpoint whose file ``path`` cannot be used."""
    return UserError(f"the checkpoint {path} is damaged ({str(reason).rstrip('.')}).{START_AGAIN}")


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _make_room(folder: Path, step: int) -> None:
    """Remove all but the newest checkpoint of an earlier step, from which this training has come.

    A later one was damaged, or it would have been continued from; unfinished ones belong to a process that was killed.
    """
    kept = [path for path in _by_step(folder) if _step(path) < step][-1:]
    for path in folder.iterdir() if folder.is_dir() else ():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _without_checksums(path: Path, content: bytes) -> Progress:
    """Return the progress of a checkpoint that an earlier version wrote, which had no checksums.

    A damaged file of today has at least six keys, and is none of these.
    """
    try:
        fields = json.loads(content)
        if fields.keys() != {"step", "tokens", "seconds", "stream"}:
            raise damaged_error(path, "its content does not have the SHA-256 that it names")
        progress = Progress(**fields)
    except (ValueError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, UserError) else damaged_error(path, error) from None
    warnings.warn(f"{path.parent} has no checksums and is read without; the next checkpoint has them.", stacklevel=4)
    return progress
