"""Shuffling of a stream of any length in bounded memory, refilled a part at a time.

`StaggeredOrder` says which rows go together; `StaggeredShuffle` is the stage that follows it. Rows are activations
(`kronsae.data.buffer`) or windows of tokens (`kronsae.data.tokens`): what keeps them is a `RowStore`.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from kronsae.data.random import permutation
from kronsae.data.stream import MakeStream, State, check_state
from kronsae.support.errors import UserError

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Rows_co = TypeVar("Rows_co", covariant=True)
Rows = TypeVar("Rows")

START: State = {"upstream": None, "rows": 0}
"""Position of a `BlockReader` at the beginning of the stream."""

LET_GO = -1
"""In place of the place of a row that is not kept."""


class RowStore(Protocol[Item_contra, Rows_co]):
    """Keeps rows of items at numbered places."""

    def count(self, item: Item_contra, /) -> int:
        """Number of rows of an item."""
        ...

    def put(self, item: Item_contra, start: int, places: Int64[Tensor, "N"], /) -> None:
        """Keep the rows of an item from ``start`` on at these places; not those whose place is `LET_GO`."""
        ...

    def take(self, places: Int64[Tensor, "N"], /) -> Rows_co:
        """Return a copy of the rows at these places."""
        ...


class BlockReader(Generic[Item]):
    """Read a stream in blocks of any size.

    Blocks do not end where the stream's items end: an item that does not fit is divided, and
    ``position = {"upstream": state before the current item, "rows": rows taken of it}`` says where.

    Args:
        make_upstream: Makes the stream of items.
        store: Keeps what is read.
        position: Where to begin; None is the beginning.
    """

    def __init__(
        self, make_upstream: MakeStream[Item], store: RowStore[Item, object], position: State | None = None
    ) -> None:
        self.position = START if position is None else position
        self._items = iter(make_upstream(state=self.position["upstream"]))
        self._store = store
        self._item: tuple[Item, State] | None = None

    def read(self, places: Int64[Tensor, "N"]) -> int:
        """Keep the next N rows at these places; return how many there were, less than N only at the stream's end."""
        count = 0
        while count < len(places):
            self._item = self._item or next(self._items, None)
            if self._item is None:
                break
            item, after = self._item
            start, rows = self.position["rows"], self._store.count(item)
            taken = min(rows - start, len(places) - count)
            self._store.put(item, start, places[count : count + taken])
            count += taken
            if start + taken == rows:
                self.position = {"upstream": after, "rows": 0}
                self._item = None
            else:
                self.position = {**self.position, "rows": start + taken}
        return count


@dataclass(frozen=True, kw_only=True)
class StaggeredOrder:
    """In which order the rows of a stream are served, of which at most ``capacity`` are held at once.

    The stream is divided into blocks of r batches. Each block is permuted and cut into r parts of a batch. Unit u
    serves part i of block u - i for i = 0 ... r - 1, permuted together: r batches, one of which comes from the block
    that was just read. Units before the r-th serve what there is; the last one serves all that is held.

    Every row is served exactly once, within r units of its arrival, and unit u depends only on the blocks
    u - r + 1 ... u. Part i of a block is held for i + 1 units, so r (r + 1) / 2 batches are held; r is the largest
    number for which these fit into the capacity. A refill so replaces a share of 2 / (r + 1) of what is held.

    Args:
        batch_size: Rows in a batch.
        capacity: Rows that may be held, at least ``batch_size``.
        seed: Seed of the order.
        purpose: What the order is for; two purposes have unrelated orders.
    """

    batch_size: int
    capacity: int
    seed: int
    purpose: str

    @cached_property
    def parts(self) -> int:
        """r: parts of a block, and batches of a unit."""
        return (math.isqrt(8 * (self.capacity // self.batch_size) + 1) - 1) // 2

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.parts * self.batch_size

    @property
    def held_rows(self) -> int:
        """Rows that are held at most, and the number of places for them."""
        return self.parts * (self.parts + 1) // 2 * self.batch_size

    def first_block(self, unit: int) -> int:
        """The oldest block of which the unit serves a part."""
        return max(0, unit - self.parts + 1)

    def places(self, block: int, unit: int) -> Int64[Tensor, "N"]:
        """Where to keep each row of a block, in the order of the stream; `LET_GO` if served before ``unit``."""
        order = permutation(self.block_rows, self.seed, self.purpose, 0, block)
        part, within = order // self.batch_size, order % self.batch_size
        places = self._slot(part, block) * self.batch_size + within
        return torch.where(part < unit - block, LET_GO, places)

    def served(self, unit: int) -> Int64[Tensor, "N"]:
        """Places of the rows that a unit serves, in order, where the stream goes on after its block."""
        blocks = torch.arange(self.first_block(unit), unit + 1)
        slots = self._slot(unit - blocks, blocks)
        places = (slots[:, None] * self.batch_size + torch.arange(self.batch_size)).flatten()
        return self._mixed(places, unit)

    def served_last(self, unit: int, count: int) -> Int64[Tensor, "N"]:
        """Places of the rows that a unit serves, in order, where the stream ends after ``count`` rows of its block."""
        blocks = [self.places(block, unit) for block in range(self.first_block(unit), unit)]
        places = torch.cat([*blocks, self.places(unit, unit)[:count]])
        return self._mixed(places[places != LET_GO], unit)

    def _slot(self, part: Tensor, block: Tensor | int) -> Tensor:
        """Part i needs i + 1 places of a batch, taken in turn: its block's successor after i + 1 finds it served."""
        return part * (part + 1) // 2 + block % (part + 1)

    def _mixed(self, places: Tensor, unit: int) -> Tensor:
        return places[permutation(len(places), self.seed, self.purpose, 1, unit)]


class StaggeredShuffle(Generic[Item, Rows]):
    """Yield ``(rows, state)``: the rows of a stream in a `StaggeredOrder`, a batch at a time.

    The state is ``{"upstream", "rows", "unit", "batch"}``: where the oldest block began of which the next batch needs
    a part, and how far the order was served. Nothing of what is held is in it; going on reads at most r blocks again.

    Args:
        make_upstream: Makes the stream of items.
        store: Keeps the rows, at ``order.held_rows`` places.
        order: The order.
        drop_remainder: Whether to drop what does not fill a batch at the stream's end, instead of serving it.
        state: Go on after the batch that this state came with.
    """

    def __init__(
        self,
        make_upstream: MakeStream[Item],
        store: RowStore[Item, Rows],
        order: StaggeredOrder,
        *,
        drop_remainder: bool = True,
        state: State | None = None,
    ) -> None:
        self._make_upstream = make_upstream
        self._store = store
        self._order = order
        self._drop_remainder = drop_remainder
        self._state = {**START, "unit": 0, "batch": 0} if state is None else state
        check_state(self._state, ("upstream", "rows", "unit", "batch"))

    def __iter__(self) -> Iterator[tuple[Rows, State]]:
        order, unit, first = self._order, self._state["unit"], self._state["batch"]
        reader = BlockReader(self._make_upstream, self._store, {key: self._state[key] for key in START})
        positions = deque[State](maxlen=order.parts)  # where the blocks began of which a part is held
        for block in itertools.count(order.first_block(unit)):
            positions.append(reader.position)
            count = reader.read(order.places(block, unit))
            last = count < order.block_rows
            if block < unit:
                if last:
                    raise UserError("the stream must be the one that its state is of; it ended earlier. Begin anew.")
                continue
            places = order.served_last(unit, count) if last else order.served(unit)
            batches = len(places) // order.batch_size if self._drop_remainder else -(-len(places) // order.batch_size)
            if batches == 0 and unit == 0 and self._drop_remainder:
                raise UserError(
                    f"batch_size must not exceed the {order.purpose} there are; got {order.batch_size} with {count}. "
                    "Give more text or a smaller batch_size."
                )
            following = {**deque([*positions, reader.position], maxlen=order.parts)[0], "unit": unit + 1, "batch": 0}
            for batch in range(first, batches):
                whole = batch + 1 == batches and not last
                state = following if whole else {**positions[0], "unit": unit, "batch": batch + 1}
                yield self._store.take(places[batch * order.batch_size : (batch + 1) * order.batch_size]), state
            if last:
                return
            unit, first = unit + 1, 0
