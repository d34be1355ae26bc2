"""Yield activations in random order and in batches of fixed size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kronsae.data.random import LazyPermutation
from kronsae.data.shuffle import NOT_STORED, StaggeredOrder, StaggeredShuffle
from kronsae.data.stream import MakeStream, State, check_state
from kronsae.support.errors import UserError

Activations: TypeAlias = dict[str, Float[Tensor, "N D"]]
"""Activations by hook; row n of every tensor belongs to the same token."""

PLAIN = "values"
"""Hook name of a tensor that is given without a name."""


class ActivationRows:
    """Store rows of activations; implements `kronsae.data.shuffle.RowStore`.

    Args:
        capacity: Number of slots. Their memory, ``capacity * d_in * 4`` bytes per hook, is allocated once, on the
            device of the first activations.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._storage: Activations = {}

    def count(self, item: Mapping[str, Tensor]) -> int:
        """Return the number of rows, which is the same for every hook."""
        return next((len(rows) for rows in item.values()), 0)

    def put(self, item: Mapping[str, Tensor], start: int, slots: Int64[Tensor, "N"]) -> None:
        """Store the rows from ``start`` on in the given slots, the same slots for every hook."""
        kept = slots != NOT_STORED
        for hook, rows in item.items():
            if hook not in self._storage:
                self._storage[hook] = rows.new_empty((self._capacity, *rows.shape[1:]))
            arrived = rows[start : start + len(slots)]
            self._storage[hook][slots[kept].to(rows.device)] = arrived[kept.to(rows.device)]

    def take(self, slots: Int64[Tensor, "N"]) -> Activations:
        """Return a copy of the rows in the given slots."""
        return {hook: block[slots.to(block.device)] for hook, block in self._storage.items()}


def buffer_order(batch_size: int, buffer_tokens: int, seed: int) -> StaggeredOrder:
    """Return the order in which a `ShuffleBuffer` serves activations."""
    return StaggeredOrder(batch_size=batch_size, capacity=buffer_tokens, seed=seed, purpose="activations")


class ShuffleBuffer:
    """Yield ``({hook: values_BD}, state)`` in batches of fixed size, shuffled through a buffer.

    The order is defined by `StaggeredOrder`. Each refill replaces a share of about ``sqrt(2 * batch_size / C)`` of the
    C rows in the buffer, so that the distribution of the batches changes slowly. All hooks have the same order. The
    state does not contain the buffer: resuming from it reads at most 2C rows again.

    Args:
        make_upstream: Makes the stream of activations, such as
            ``partial(ActivationStream, language_model, hooks, make_tokens)``.
        batch_size: Rows in a batch. A remainder smaller than this, at the end of a stream, is dropped.
        buffer_tokens: Maximum number of rows in the buffer. They take ``buffer_tokens * d_in * 4`` bytes per hook on
            the activations' device. The first batch is yielded after about ``sqrt(2 * buffer_tokens * batch_size)``
            rows have been read.
        seed: Seed of the order.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If the buffer is smaller than a batch, the stream ends before the first batch is full, or the state
            was written by an incompatible version.
    """

    def __init__(
        self,
        make_upstream: MakeStream[Mapping[str, Tensor]],
        *,
        batch_size: int,
        buffer_tokens: int,
        seed: int = 0,
        state: State | None = None,
    ) -> None:
        _check_batch_size(batch_size)
        if buffer_tokens < batch_size:
            raise UserError(
                f"buffer_tokens must be at least batch_size; got {buffer_tokens} with {batch_size}. "
                f"Give at least {16 * batch_size} to shuffle well."
            )
        order = buffer_order(batch_size, buffer_tokens, seed)
        rows = ActivationRows(order.held_rows)
        self._shuffled = StaggeredShuffle(make_upstream, rows, order, state=state)

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        return iter(self._shuffled)


class TensorStream:
    """Yield ``({hook: values_BD}, state)`` from activations in memory or memory-mapped, shuffled per epoch.

    The state is ``{"epoch", "next_batch"}``. Rows that do not fill the last batch of an epoch are dropped from it.

    Args:
        values: One tensor or array ``[N, d_in]`` (its hook name is then ``"values"``), or one per hook.
        batch_size: Rows in a batch.
        seed: Seed of the order.
        repeat: Whether to repeat the data indefinitely.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If the shapes are not as required, or there are fewer rows than ``batch_size``.

    Example:
        >>> stream = TensorStream(torch.arange(6.0)[:, None], batch_size=3, repeat=False)
        >>> [batch["values"].shape for batch, _ in stream]
        [torch.Size([3, 1]), torch.Size([3, 1])]
    """

    def __init__(
        self,
        values: Tensor | npt.NDArray[Any] | Mapping[str, Tensor | npt.NDArray[Any]],
        *,
        batch_size: int,
        seed: int = 0,
        repeat: bool = True,
        state: State | None = None,
    ) -> None:
        _check_batch_size(batch_size)
        self._values = dict(values) if isinstance(values, Mapping) else {PLAIN: values}
        shapes = {hook: tuple(tensor.shape) for hook, tensor in self._values.items()}
        if any(len(shape) != 2 for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) != 1:
            raise UserError(
                f"values must be [tokens, d_in] with the same number of tokens for every hook; got {shapes}. "
                "Flatten sequences to rows."
            )
        self._rows = EpochRows(
            next(iter(shapes.values()))[0], batch_size=batch_size, seed=seed, repeat=repeat, state=state
        )

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        for rows, state in self._rows:
            yield {hook: _take(tensor, rows).float() for hook, tensor in self._values.items()}, state


class EpochRows:
    """Yield ``(rows_B, state)``: the row indices of each batch, in a new random order every epoch.

    The state is ``{"epoch", "next_batch"}``. The order is a `LazyPermutation`, which needs no memory per row.

    Args:
        count: Number of rows.
        batch_size: Rows in a batch. Rows that do not fill the last batch of an epoch are dropped from that epoch.
        seed: Seed of the order.
        repeat: Whether to repeat the data indefinitely.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If there are fewer rows than ``batch_size``, or the state was written by an incompatible version.
    """

    def __init__(
        self, count: int, *, batch_size: int, seed: int = 0, repeat: bool = True, state: State | None = None
    ) -> None:
        _check_batch_size(batch_size)
        if count < batch_size:
            raise UserError(
                f"batch_size must not exceed the number of activations; got {batch_size} with {count}. "
                "Give more activations or a smaller batch_size."
            )
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._repeat = repeat
        self._state: State = {"epoch": 0, "next_batch": 0} if state is None else state
        check_state(self._state, ("epoch", "next_batch"))

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], State]]:
        epoch, first = self._state["epoch"], self._state["next_batch"]
        while True:
            order = LazyPermutation(self._count, self._seed, "epoch", epoch)
            for batch in range(first, self._count // self._batch_size):
                rows = order.part(batch * self._batch_size, (batch + 1) * self._batch_size)
                yield rows, {"epoch": epoch, "next_batch": batch + 1}
            if not self._repeat:
                return
            epoch, first = epoch + 1, 0


def _take(values: Tensor | npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> Tensor:
    """Return a copy of the given rows; only these rows of a memory-mapped array are read."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values[rows])
    return values[torch.from_numpy(rows).to(values.device)]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}.")
