"""The shares of a batch, one per row of the mesh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kronsae.distributed.gradients import add_gradients
from kronsae.distributed.team import Group
from kronsae.kernels import RowGradients


class TokenShares:
    """Implements `kronsae.core.shares.Shares` over the processes that hold the same heads.

    Args:
        group: these processes.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._holder_B: Tensor | None = None

    def begin(self, holder_B: Int[Tensor, " B"]) -> None:
        """Start a batch: which share each of its tokens belongs to, in the order of the batch."""
        self._holder_B = holder_B

    @property
    def holder_B(self) -> Int[Tensor, " B"]:
        """The share that each token of the batch belongs to."""
        assert self._holder_B is not None, "begin() was not called"
        return self._holder_B

    def tokens(self, own: int) -> int:
        assert own == int((self.holder_B == self.group.me).sum())
        return len(self.holder_B)

    def sum(self, own: Tensor) -> Tensor:
        return self.group.sum(own)

    def smallest(self, own: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return -self.group.max(-own)

    def any(self, own: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self.group.max(own.to(torch.uint8)).bool()

    def rows(self, own: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "C ..."]:
        """Return the rows of all shares, in the order of the batch."""
        counts = torch.bincount(self.holder_B, minlength=self.group.size).tolist()
        return in_order(self.group.gather_rows(own, counts), self.holder_B)

    def gather(self, own: Shaped[Tensor, "N ..."]) -> list[Tensor]:
        """Return a list of any length of each share."""
        return self.group.gather_rows(own)

    def place_of(self, rows_N: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Return the place in the batch of some of the own rows."""
        return (self.holder_B == self.group.me).nonzero().squeeze(1).to(rows_N.device)[rows_N]

    def add_gradients(self, parameters: Sequence[Tensor], rows: RowGradients) -> None:
        add_gradients(self.group, parameters, rows)


def in_order(parts: Sequence[Tensor], holder_B: Int[Tensor, " B"]) -> Tensor:
    """Return the rows of the parts, each in its own order, as ``holder_B`` deals them out."""
    joined = torch.cat(list(parts))
    out = torch.empty_like(joined)
    out[holder_B.argsort(stable=True).to(joined.device)] = joined
    return out
