"""Checkpoints of a training by several processes, which any number of processes resumes.

Each process writes its part of every tensor that is divided (`kronsae.distributed.heads.DIVIDED`), and
`torch.distributed.checkpoint` deals out the others. Loading asks for the parts that the present processes hold, however
the tensors were divided when they were written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from kronsae.distributed.heads import DIVIDED
from kronsae.distributed.storage import DAMAGES, ShardReader, ShardWriter
from kronsae.distributed.team import Team
from kronsae.support.errors import UserError
from kronsae.training.member import Member
from kronsae.training.state import (
    Checkpoint,
    NewCheckpoint,
    Progress,
    checkpoint_folder,
    damaged_error,
    give_states,
    new_checkpoint,
    newest_checkpoint,
    partial_folder,
    state_of,
    verified,
)


def save_shards(team: Team, folder: Path, members: Sequence[Member], progress: Progress) -> None:
    """Write a checkpoint, as `kronsae.training.state.save_state` does; all processes call this."""
    elsewhere = NewCheckpoint(partial_folder(folder, progress))
    with new_checkpoint(folder, progress) if team.leads else nullcontext(elsewhere) as new:
        team.wait()  # until the folder exists
        tensors = {name: _placed(value, name, team) for name, value in state_of(members).items()}
        try:
            save(tensors, storage_writer=ShardWriter(new, team.rank))
        except CheckpointException as error:
            raise UserError(f"the checkpoint in {folder} could not be written ({_reason(error)}).") from None
    team.wait()  # until process 0 has made it the newest


def agreed_checkpoint(team: Team, folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint as process 0 finds it (`newest_checkpoint`), verified by every process."""
    found = newest_checkpoint(folder, say) if team.leads else None
    step = team.told(-1 if found is None else found.progress.step)
    if found is None and step >= 0:
        found = verified(checkpoint_folder(folder, step))
    return found


def load_shards(team: Team | None, checkpoint: Checkpoint, members: Sequence[Member]) -> None:
    """Load a checkpoint, written by any number of processes, into the members.

    Args:
        team: the present processes; None: a single one, without process group.
        checkpoint: the checkpoint.
        members: the SAEs, as this process holds them.

    Raises:
        UserError: it belongs to other SAEs.
    """
    newest = checkpoint.folder
    parts = 1 if team is None else team.heads.size
    try:
        stored = ShardReader(newest).read_metadata().state_dict_metadata
        tensors = {name: _empty(name, about, parts) for name, about in stored.items()}
        placed = {name: value if team is None else _placed(value, name, team) for name, value in tensors.items()}
        with warnings.catch_warnings():  # that there is no process group is intended
            warnings.simplefilter("ignore")
            load(placed, storage_reader=ShardReader(newest))
    except (CheckpointException, *DAMAGES) as error:
        raise damaged_error(newest, _reason(error)) from None
    give_states(members, tensors, newest)


def _empty(name: str, about: object, parts: int) -> Tensor:
    assert isinstance(about, TensorStorageMetadata)
    size = list(about.size)
    if parts > 1 and _is_divided(name):
        size[0] //= parts
    return torch.empty(size, dtype=about.properties.dtype)


def _placed(value: Tensor, name: str, team: Team) -> Tensor:
    """Return a tensor of the state as the part of a whole that it is."""
    if team.heads.size == 1 or not _is_divided(name):
        return value
    return DTensor.from_local(value.cpu(), team.mesh, [Replicate(), Shard(0)], run_check=False)


def _is_divided(name: str) -> bool:
    """Return whether ``<member>/sae.<weight>`` or ``<member>/optimizer.<weight>.<moment>`` is held in parts."""
    kind, _, rest = name.partition("/")[2].partition(".")
    return (kind == "sae" and rest in DIVIDED) or (kind == "optimizer" and rest.removesuffix("_sq") in MOMENTS)


MOMENTS = {f"{name}.exp_avg" for name in DIVIDED}


def _reason(error: BaseException) -> str:
    """Return the first reason of a process, in one line."""
    if isinstance(error, CheckpointException):
        return _reason(next(iter(error.failures.values()))[0])
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
