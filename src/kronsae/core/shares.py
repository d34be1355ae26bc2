"""A batch whose tokens several processes hold, each a share: what is taken over its tokens is taken over all shares.

The processes compute one loss. The loss that each differentiates is the summand of its own tokens, so losses and
gradients add up over the shares. Whatever is not a sum over tokens (the threshold of a batch, an explained variance,
the set of dead latents) asks `shares()`. In one process, the default, a share is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kronsae.kernels import RowGradients


@runtime_checkable
class Shares(Protocol):
    """The processes that share a batch. All of them call every method, in the same order; nothing has a gradient."""

    def tokens(self, own: int) -> int:
        """Return the number of tokens of the batch, of which this process holds ``own``."""
        ...

    def sum(self, own: Tensor) -> Tensor:
        """Return the sum over the shares, elementwise."""
        ...

    def smallest(self, own: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the smallest value of the shares."""
        ...

    def any(self, own: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return, elementwise, whether it is true of one of the shares."""
        ...

    def rows(self, own: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "C ..."]:
        """Return the rows of all shares, one share after another."""
        ...

    def add_gradients(self, parameters: Sequence[Tensor], rows: RowGradients) -> None:
        """Replace the gradients of the own loss, in ``.grad`` and in ``rows``, by their sums over the shares."""
        ...


class WholeBatch:
    """The `Shares` of a single process, which holds all tokens."""

    def tokens(self, own: int) -> int:
        return own

    def sum(self, own: Tensor) -> Tensor:
        return own

    def smallest(self, own: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return own

    def any(self, own: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return own

    def rows(self, own: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "C ..."]:
        return own

    def add_gradients(self, parameters: Sequence[Tensor], rows: RowGradients) -> None:
        """Do nothing: they are those of the whole batch."""


_current: ContextVar[Shares | None] = ContextVar("kronsae_shares", default=None)
_WHOLE = WholeBatch()


def shares() -> Shares:
    """Return who shares the batches of this context: those of the innermost `sharing`, else the process alone."""
    return _current.get() or _WHOLE


@contextmanager
def sharing(among: Shares) -> Iterator[None]:
    """Inside the block, every batch is the share of one."""
    token = _current.set(among)
    try:
        yield
    finally:
        _current.reset(token)


def share_of_mean(values_B: Float[Tensor, "B ..."]) -> Float[Tensor, "..."]:
    """Return the own tokens' summand of the mean over the tokens of the batch; differentiable."""
    return values_B.sum(0) / shares().tokens(len(values_B))


def batch_mean(values_B: Float[Tensor, "B ..."]) -> Float[Tensor, "..."]:
    """Return the mean over the tokens of the batch, the same in all processes; it has no gradient."""
    return shares().sum(share_of_mean(values_B.detach()))
