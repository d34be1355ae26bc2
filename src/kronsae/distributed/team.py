"""The processes of a training, on a mesh of data x heads, and what they say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kronsae.support.errors import UserError


@dataclass(frozen=True)
class Group:
    """Some of the processes, in order of their ranks; `me` is the place of this one.

    Tensors on the CPU go through gloo, those on a GPU through NCCL. Sizes are told on the CPU, which need not wait.
    """

    handle: dist.ProcessGroup
    size: int
    me: int

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum over the group, with the same bits in every process."""
        return self._reduced(own, dist.ReduceOp.SUM)

    def max(self, own: Tensor) -> Tensor:
        """Return the largest value, elementwise."""
        return self._reduced(own, dist.ReduceOp.MAX)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have the same shape."""
        if self.size == 1:
            return [own]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.handle)
        return parts

    def gather_rows(self, own: Tensor, counts: list[int] | None = None) -> list[Tensor]:
        """Return the tensors of all processes, which may have different numbers of rows.

        Args:
            own: the rows of this process.
            counts: number of rows of each process, if all know it; None: it is asked first.
        """
        if self.size == 1:
            return [own]
        if counts is None:
            counts = [int(count) for count in self.gather(torch.tensor(len(own)))]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        return [part[:count] for part, count in zip(self.gather(padded), counts, strict=True)]

    def _reduced(self, own: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return own
        out = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, operation, group=self.handle)
        return out


@dataclass(frozen=True)
class Team:
    """The processes of a training. Those with consecutive ranks hold the same tokens and different heads.

    Args:
        mesh: a `DeviceMesh` with the dimensions ``data`` and ``heads``.
    """

    mesh: DeviceMesh

    @staticmethod
    def of(head_parallel: int) -> Team:
        """Return the team of the processes of the default group, ``head_parallel`` of which hold one dictionary."""
        shape = (dist.get_world_size() // head_parallel, head_parallel)
        return Team(init_device_mesh("cpu", shape, mesh_dim_names=("data", "heads")))

    @property
    def rank(self) -> int:
        """Number of this process, from 0; process 0 speaks and writes."""
        return int(self.mesh.get_rank())

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self.mesh.size())

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @cached_property
    def data(self) -> Group:
        """The processes that hold the same heads and other tokens."""
        return self._group("data")

    @cached_property
    def heads(self) -> Group:
        """The processes that hold the same tokens and other heads."""
        return self._group("heads")

    def _group(self, name: str) -> Group:
        return Group(self.mesh.get_group(name), self.mesh[name].size(), self.mesh.get_local_rank(name))

    def agreed(self, flag: bool) -> bool:
        """Return whether it is true of one of the processes."""
        found = torch.tensor(flag, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def told(self, number: int) -> int:
        """Return the number of process 0; those of the others do not matter."""
        found = torch.tensor(number)
        dist.broadcast(found, 0)
        return int(found)

    def wait(self) -> None:
        """Return when all processes have called this."""
        self.agreed(False)


def check_head_parallel(head_parallel: int, processes: int) -> None:
    """Raise if the processes cannot be arranged in rows of ``head_parallel``."""
    if head_parallel < 1 or processes % head_parallel:
        raise UserError(
            f"head_parallel must divide the number of processes; got {head_parallel} with {processes}. Start with "
            f"torchrun --nproc-per-node {max(1, head_parallel)}, or a multiple of it, or leave --head-parallel out."
        )
