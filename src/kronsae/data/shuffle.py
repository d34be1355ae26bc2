"""Shuffle a stream of any length through a buffer of bounded size that is refilled in parts.

`StaggeredOrder` defines the order and `StaggeredShuffle` is the stage that applies it. Rows are activations
(`kronsae.data.buffer`) or token windows (`kronsae.data.tokens`), stored in a `RowStore`.
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

NOT_STORED = -1
"""Slot of a row that is not stored."""


class RowStore(Protocol[Item_contra, Rows_co]):
    """Store rows of items in numbered slots."""

    def count(self, item: Item_contra, /) -> int:
        """Return the number of rows of an item."""
        ...

    def put(self, item: Item_contra, start: int, slots: Int64[Tensor, "N"], /) -> None:
        """Store the rows of an item from ``start`` on in the given slots; skip rows whose slot is `NOT_STORED`."""
        ...

    def take(self, slots: Int64[Tensor, "N"], /) -> Rows_co:
        """Return a copy of the rows in the given slots."""
        ...


class BlockReader(Generic[Item]):
    """Read a stream in blocks of any number of rows.

    A block can end within an item of the stream. The attribute ``position = {"upstream": state before the current item,
    "rows": rows of it already read}`` describes where reading continues.

    Args:
        make_upstream: Makes the stream of items.
        store: Stores the rows that are read.
        position: Where to start; None starts at the beginning.
    """

    def __init__(
        self, make_upstream: MakeStream[Item], store: RowStore[Item, object], position: State | None = None
    ) -> None:
        self.position = START if position is None else position
        self._items = iter(make_upstream(state=self.position["upstream"]))
        self._store = store
        self._item: tuple[Item, State] | None = None

    def read(self, slots: Int64[Tensor, "N"]) -> int:
        """Read the next N rows into the given slots; return their number, below N only at the stream's end."""
        count = 0
        while count < len(slots):
            self._item = self._item or next(self._items, None)
            if self._item is None:
                break
            item, after = self._item
            start, rows = self.position["rows"], self._store.count(item)
            taken = min(rows - start, len(slots) - count)
            self._store.put(item, start, slots[count : count + taken])
            count += taken
            if start + taken == rows:
                self.position = {"upstream": after, "rows": 0}
                self._item = None
            else:
                self.position = {**self.position, "rows": start + taken}
        return count


@dataclass(frozen=True, kw_only=True)
class StaggeredOrder:
    """Define a shuffled order of a stream's rows that needs a buffer of at most ``capacity`` rows.

    The stream is divided into blocks of r parts. A part is one batch, except for capacities below 3 batches: then r = 1
    and the part is all the batches that fit. Each block is permuted and cut into its parts. Unit u yields part i of
    block u - i for i = 0 ... r - 1, permuted together; one of them comes from the block that was just read. Units
    before the r-th yield the parts that exist; the last unit yields all rows that are still in the buffer.

    Every row is yielded exactly once, within r units of being read. Unit u depends only on the blocks
    u - r + 1 ... u. Part i of a block stays in the buffer for i + 1 units, so the buffer contains r (r + 1) / 2
    parts; r is the largest number for which these fit into ``capacity``. A refill therefore replaces a share of
    2 / (r + 1) of the buffer.

    Args:
        batch_size: Rows in a batch.
        capacity: Maximum number of rows in the buffer, at least ``batch_size``.
        seed: Seed of the order.
        purpose: Use of the order; different purposes have independent orders.
    """

    batch_size: int
    capacity: int
    seed: int
    purpose: str

    @cached_property
    def parts(self) -> int:
        """r, the number of parts of a block and of a unit."""
        return (math.isqrt(8 * (self.capacity // self.batch_size) + 1) - 1) // 2

    @cached_property
    def part_rows(self) -> int:
        """Number of rows of a part: a batch, or all batches that fit where there is one part."""
        batches = self.capacity // self.batch_size
        return self.batch_size * (batches if self.parts == 1 else 1)

    @property
    def block_rows(self) -> int:
        """Number of rows of a block."""
        return self.parts * self.part_rows

    @property
    def held_rows(self) -> int:
        """Maximum number of rows in the buffer, and the number of slots."""
        return self.parts * (self.parts + 1) // 2 * self.part_rows

    def whole_batches(self, rows: int) -> int:
        """Return the number of batches that contain only the first ``rows`` rows of a stream that goes on after them.

        The first r units yield 1, 2, ... r parts, and each later one r.
        """
        units = rows // self.block_rows
        parts = min(units, self.parts) * (min(units, self.parts) + 1) // 2 + max(0, units - self.parts) * self.parts
        return parts * (self.part_rows // self.batch_size)

    def first_block(self, unit: int) -> int:
        """Return the oldest block of which the unit yields a part."""
        return max(0, unit - self.parts + 1)

    def slots(self, block: int, unit: int) -> Int64[Tensor, "N"]:
        """Return the slot of each row of a block, in stream order; `NOT_STORED` for rows yielded before ``unit``."""
        order = permutation(self.block_rows, self.seed, self.purpose, 0, block)
        part, within = order // self.part_rows, order % self.part_rows
        slots = self._part_slot(part, block) * self.part_rows + within
        return torch.where(part < unit - block, NOT_STORED, slots)

    def served(self, unit: int) -> Int64[Tensor, "N"]:
        """Return the slots of the rows that a unit yields, in order, if the stream does not end in its block."""
        blocks = torch.arange(self.first_block(unit), unit + 1)
        part_slots = self._part_slot(unit - blocks, blocks)
        slots = (part_slots[:, None] * self.part_rows + torch.arange(self.part_rows)).flatten()
        return self._mixed(slots, unit)

    def served_last(self, unit: int, count: int) -> Int64[Tensor, "N"]:
        """Return the slots of the rows that a unit yields, in order, if the stream ends after ``count`` rows of it."""
        blocks = [self.slots(block, unit) for block in range(self.first_block(unit), unit)]
        slots = torch.cat([*blocks, self.slots(unit, unit)[:count]])
        return self._mixed(slots[slots != NOT_STORED], unit)

    def _part_slot(self, part: Tensor, block: Tensor | int) -> Tensor:
        """Return the part-sized slot of a block's part i, which has i + 1 such slots in rotation.

        The part of block b + i + 1 reuses the slot of block b, whose part has been yielded by then.
        """
        return part * (part + 1) // 2 + block % (part + 1)

    def _mixed(self, slots: Tensor, unit: int) -> Tensor:
        return slots[permutation(len(slots), self.seed, self.purpose, 1, unit)]


class StaggeredShuffle(Generic[Item, Rows]):
    """Yield ``(rows, state)``: the rows of a stream in a `StaggeredOrder`, one batch at a time.

    The state is ``{"upstream", "rows", "unit", "batch"}``: where the oldest block starts that the next batch needs, and
    the position in the order. The state does not contain the buffer; resuming from it reads at most r blocks again.

    Args:
        make_upstream: Makes the stream of items.
        store: Stores the rows in ``order.held_rows`` slots.
        order: The order.
        drop_remainder: Whether to drop the rows that do not fill a batch at the stream's end, or to yield them.
        state: State yielded with a batch; iteration resumes after that batch.
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
        positions = deque[State](maxlen=order.parts)  # start of each block with rows in the buffer
        for block in itertools.count(order.first_block(unit)):
            positions.append(reader.position)
            count = reader.read(order.slots(block, unit))
            last = count < order.block_rows
            if block < unit:
                if last:
                    raise UserError(
                        "state must come from the same stream; got one from beyond the end of this stream. "
                        "Start again without a state."
                    )
                continue
            slots = order.served_last(unit, count) if last else order.served(unit)
            batches = len(slots) // order.batch_size if self._drop_remainder else -(-len(slots) // order.batch_size)
            if batches == 0 and unit == 0 and self._drop_remainder:
                raise UserError(
                    f"batch_size must not exceed the number of {order.purpose}; got {order.batch_size} with {count}. "
                    "Give more text or a smaller batch_size."
                )
            following = {**deque([*positions, reader.position], maxlen=order.parts)[0], "unit": unit + 1, "batch": 0}
            for batch in range(first, batches):
                whole = batch + 1 == batches and not last
                state = following if whole else {**positions[0], "unit": unit, "batch": batch + 1}
                yield self._store.take(slots[batch * order.batch_size : (batch + 1) * order.batch_size]), state
            if last:
                return
            unit, first = unit + 1, 0
