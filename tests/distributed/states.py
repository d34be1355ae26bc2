"""What a process of `tests.distributed.test_storage` does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kronsae.core.shares import sharing
from kronsae.distributed.checkpoint import agreed_checkpoint, load_shards, save_shards
from kronsae.distributed.heads import DIVIDED, HeadSplit
from kronsae.distributed.launch import team
from kronsae.distributed.shares import TokenShares
from kronsae.runs.recipes import kron
from kronsae.training.member import Member
from kronsae.training.state import Progress


def save_in_team(folder: Path) -> dict[str, Tensor]:
    """Save a trained SAE, read it again, and return its whole state."""
    with team(2) as processes:
        assert processes is not None
        among = TokenShares(processes.data)
        split = HeadSplit(processes.heads, among)
        config = kron(num_heads=4, d_base=2, d_extension=2, k=2)
        member, again = (Member(config, 8, "h", 4, split=split) for _ in range(2))
        holder_B = torch.arange(16) % 2
        for step in range(3):
            among.begin(holder_B)
            x_BD = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            with sharing(among):
                member.step(x_BD[holder_B == processes.data.me], step, want_metrics=False)
        save_shards(processes, folder, [member], Progress(3, 48, 1.0, {"batch": 3}))
        saved = agreed_checkpoint(processes, folder, print)
        assert saved is not None
        load_shards(processes, saved, [again])
        state = member.state()
        state["seconds"] = again.state()["seconds"]  # each process has its own; one is kept
        for name, value in again.state().items():
            assert torch.equal(value, state[name]), name
        return {name: whole(name, value, processes.heads.gather) for name, value in state.items()}


def save_apart_in_team(folder: Path) -> None:
    """Save to a folder of each process alone, as on machines without a common file system."""
    with team() as processes:
        assert processes is not None
        member = Member(kron(num_heads=4, d_base=2, d_extension=2, k=2), 8, "h", 4)
        save_shards(processes, folder / f"machine-{processes.rank}", [member], Progress(1, 16, 1.0, None))


def whole(name: str, value: Tensor, gather: object) -> Tensor:
    """Return a tensor of the state of a single process."""
    if any(part in name for part in DIVIDED) and value.dim():
        return torch.cat(gather(value))  # type: ignore[operator]
    return value.clone()
