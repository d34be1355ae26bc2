"""Activations in batches of a fixed size and in random order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.data.stream import MakeStream, State
from kronsae.support.errors import UserError

Activations: TypeAlias = dict[str, Float[Tensor, "N D"]]
"""Activations by hook; row n of every tensor belongs to the same token."""

PLAIN = "values"
"""The hook name of a tensor that was given without one."""


class RowReader:
    """Read a stream of activations in blocks of exactly so many rows.

    Blocks do not end where the stream's items end: an item that does not fit is divided, and
    ``position = {"upstream": state before the current item, "rows": rows taken of it}`` says where.

    Args:
        make_upstream: Makes the stream of activations.
        capacity: Rows in a block; its memory, ``capacity * d_in * 4`` bytes per hook, is allocated once.
        position: Where to begin; None is the beginning.
    """

    def __init__(
        self, make_upstream: MakeStream[Mapping[str, Tensor]], capacity: int, position: State | None = None
    ) -> None:
        self.position: State = {"upstream": None, "rows": 0} if position is None else position
        self._items = iter(make_upstream(state=self.position["upstream"]))
        self._capacity = capacity
        self._item: tuple[Mapping[str, Tensor], State] | None = None
        self._storage: Activations | None = None

    def read(self, at_most: int | None = None) -> Activations:
        """Return the next rows: a full block, or less at the stream's end; the next call overwrites them."""
        wanted = self._capacity if at_most is None else min(self._capacity, at_most)
        count = 0
        while count < wanted:
            self._item = self._item or next(self._items, None)
            if self._item is None:
                break
            values, after = self._item
            start = self.position["rows"]
            rows = _num_rows(values)
            taken = min(rows - start, wanted - count)
            self._store(values, start, taken, count)
            count += taken
            if start + taken == rows:
                self.position = {"upstream": after, "rows": 0}
                self._item = None
            else:
                self.position = {**self.position, "rows": start + taken}
        return {hook: block[:count] for hook, block in (self._storage or {}).items()}

    def _store(self, values: Mapping[str, Tensor], start: int, taken: int, at: int) -> None:
        if self._storage is None:
            self._storage = {hook: rows.new_empty((self._capacity, *rows.shape[1:])) for hook, rows in values.items()}
        for hook, block in self._storage.items():
            block[at : at + taken] = values[hook][start : start + taken]


class ShuffleBuffer:
    """Yield ``({hook: values_BD}, state)`` in batches of one size, mixed across documents.

    Fills a block of rows, serves each of its rows once in a seeded random order, fills the next. All hooks
    are permuted alike. The state says where the block began and how far it was served,
    ``{"upstream", "rows", "block", "batch"}``, and holds nothing of the block: going on from it reads one
    block again.

    Args:
        make_upstream: Makes the stream of activations, such as
            ``partial(ActivationStream, language_model, hooks, make_tokens)``.
        batch_size: Rows in a batch. A remainder smaller than this, at the end of a stream, is dropped.
        buffer_tokens: Rows in a block, rounded down to whole batches; takes ``buffer_tokens * d_in * 4`` bytes
            per hook on the activations' device.
        seed: Seed of the order.
        state: Go on after the batch that this state came with.

    Raises:
        UserError: If the buffer is smaller than a batch, or the stream ends before the first batch is full.
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
                f"Give at least {16 * batch_size} to mix well."
            )
        self._make_upstream = make_upstream
        self._batch_size = batch_size
        self._capacity = buffer_tokens // batch_size * batch_size
        self._seed = seed
        self._state: State = {"upstream": None, "rows": 0, "block": 0, "batch": 0} if state is None else state

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        block, first = self._state["block"], self._state["batch"]
        begin = {key: self._state[key] for key in ("upstream", "rows")}
        reader = RowReader(self._make_upstream, self._capacity, begin)
        while True:
            begin = reader.position
            values = reader.read()
            count = _num_rows(values)
            batches = count // self._batch_size
            if batches == 0 and begin == {"upstream": None, "rows": 0}:
                raise UserError(
                    f"batch_size must not exceed the activations there are; got {self._batch_size} with {count}. "
                    "Give more text or a smaller batch_size."
                )
            if batches == 0:
                return
            order = permutation(count, self._seed, block)
            for batch in range(first, batches):
                rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
                if batch + 1 < batches:
                    state = {**begin, "block": block, "batch": batch + 1}
                else:  # a served block need not be read again
                    state = {**reader.position, "block": block + 1, "batch": 0}
                yield {hook: take(tensor, rows) for hook, tensor in values.items()}, state
            block, first = block + 1, 0


class TensorStream:
    """Yield ``({hook: values_BD}, state)`` from activations in memory or memory-mapped, shuffled per epoch.

    The state is ``{"epoch", "batch"}``. Rows that do not fill the last batch of an epoch are dropped from it.

    Args:
        values: One tensor or array ``[N, d_in]`` (its hook is then called ``"values"``), or one per hook.
        batch_size: Rows in a batch.
        seed: Seed of the order.
        repeat: Whether to begin anew at the end, without end.
        state: Go on after the batch that this state came with.

    Raises:
        UserError: If the shapes do not fit, or there are fewer rows than a batch.

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
                f"values must be [tokens, d_in] with as many tokens at every hook; got {shapes}. "
                "Flatten sequences to rows."
            )
        self._count = next(iter(shapes.values()))[0]
        if self._count < batch_size:
            raise UserError(
                f"batch_size must not exceed the activations there are; got {batch_size} with {self._count}. "
                "Give more activations or a smaller batch_size."
            )
        self._batch_size = batch_size
        self._seed = seed
        self._repeat = repeat
        self._state: State = {"epoch": 0, "batch": 0} if state is None else state

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        epoch, first = self._state["epoch"], self._state["batch"]
        while True:
            order = permutation(self._count, self._seed, epoch)
            for batch in range(first, self._count // self._batch_size):
                rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
                values = {hook: take(tensor, rows).float() for hook, tensor in self._values.items()}
                yield values, {"epoch": epoch, "batch": batch + 1}
            if not self._repeat:
                return
            epoch, first = epoch + 1, 0


def permutation(count: int, seed: int, *parts: int) -> Tensor:
    """Return a random order of ``count`` things, a function of the seed and the parts alone."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(count, generator=generator)


def take(values: Tensor | npt.NDArray[Any], rows: Tensor) -> Tensor:
    """Return a copy of the given rows; of a memory-mapped array only these are read."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values[rows.numpy()])
    return values[rows.to(values.device)]


def _num_rows(values: Mapping[str, Tensor]) -> int:
    return next((len(rows) for rows in values.values()), 0)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}.")
