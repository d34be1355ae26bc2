"""Test the staggered order: every row once, bounded memory, resumable after every batch, well shuffled."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronsae.data.shuffle import NOT_STORED, StaggeredOrder, StaggeredShuffle
from kronsae.data.stream import State
from kronsae.support.errors import UserError

Batch = list[int]


class Numbers:
    """Yield items of the given sizes with consecutively numbered rows, repeatedly if asked."""

    def __init__(self, sizes: list[int], repeat: bool, *, state: State | None) -> None:
        self.sizes, self.repeat = sizes, repeat
        self.start = 0 if state is None else state["item"]

    def __iter__(self) -> Iterator[tuple[list[int], State]]:
        sizes = itertools.cycle(self.sizes) if self.repeat else self.sizes
        first = 0
        for item, size in enumerate(sizes):
            if item >= self.start:
                yield list(range(first, first + size)), {"item": item + 1}
            first += size


class Cells:
    """A `RowStore` of numbers that fails if a slot is overwritten before it was read.

    A resumed stream does not yield the batches of its first unit that were yielded before, so this is not checked then.
    """

    def __init__(self, capacity: int, goes_on: bool = False) -> None:
        self.cells: list[int | None] = [None] * capacity
        self.goes_on = goes_on
        self.read = 0

    def count(self, item: list[int]) -> int:
        return len(item)

    def put(self, item: list[int], start: int, slots: Tensor) -> None:
        for number, slot in zip(item[start:], slots.tolist(), strict=False):
            self.read += 1
            if slot != NOT_STORED:
                assert self.cells[slot] is None or self.goes_on
                self.cells[slot] = number

    def take(self, slots: Tensor) -> Batch:
        taken = [self.cells[slot] for slot in slots.tolist()]
        for slot in slots.tolist():
            self.cells[slot] = None
        assert None not in taken
        return [number for number in taken if number is not None]


def order(batch_size: int, capacity: int, seed: int = 0, purpose: str = "numbers") -> StaggeredOrder:
    return StaggeredOrder(batch_size=batch_size, capacity=capacity, seed=seed, purpose=purpose)


def shuffled(
    sizes: list[int], the_order: StaggeredOrder, *, repeat: bool = False, **options: Any
) -> StaggeredShuffle[list[int], Batch]:
    cells = Cells(the_order.held_rows, goes_on=options.get("state") is not None)
    return StaggeredShuffle(partial(Numbers, sizes, repeat), cells, the_order, **options)


orders = st.builds(
    lambda batch_size, batches, odd, seed: order(batch_size, batch_size * batches + odd % batch_size, seed),
    st.integers(1, 5),
    st.integers(1, 22),
    st.integers(0, 4),
    st.integers(0, 5),
)
streams = st.lists(st.integers(0, 13), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(sizes=streams, the_order=orders, drop=st.booleans())
def test_every_row_is_served_once_and_the_remainder_is_less_than_a_batch(
    sizes: list[int], the_order: StaggeredOrder, drop: bool
) -> None:
    total, size = sum(sizes), the_order.batch_size
    stream = shuffled(sizes, the_order, drop_remainder=drop)
    if drop and total < size:
        with pytest.raises(UserError, match=rf"^batch_size must not exceed the number of numbers; got {size} with"):
            list(stream)
        return
    batches = [batch for batch, _ in stream]
    served = [number for batch in batches for number in batch]
    assert len(set(served)) == len(served) == (total // size * size if drop else total)
    assert set(served) <= set(range(total))
    assert all(len(batch) == size for batch in batches[: None if drop else -1])


@settings(max_examples=40, deadline=None)
@given(sizes=streams, the_order=orders, repeat=st.booleans(), drop=st.booleans())
def test_it_goes_on_exactly_after_every_batch(
    sizes: list[int], the_order: StaggeredOrder, repeat: bool, drop: bool
) -> None:
    repeat = repeat and sum(sizes) > 0
    if drop and not repeat and sum(sizes) < the_order.batch_size:
        return
    options: dict[str, Any] = {"repeat": repeat, "drop_remainder": drop}
    whole = list(itertools.islice(shuffled(sizes, the_order, **options), 30))
    for at, (_, state) in enumerate(whole):
        again = shuffled(sizes, the_order, state=json.loads(json.dumps(state)), **options)
        following = list(itertools.islice(again, 4))
        assert following[: len(whole) - at - 1] == whole[at + 1 : at + 5]
        if len(whole) < 30:
            assert len(following) == min(4, len(whole) - at - 1)


@settings(max_examples=60, deadline=None)
@given(the_order=orders)
def test_what_is_held_fits_and_going_on_reads_two_capacities_at_most(the_order: StaggeredOrder) -> None:
    assert the_order.held_rows <= the_order.capacity
    parts = the_order.parts
    assert (parts + 1) * (parts + 2) // 2 * the_order.batch_size > the_order.capacity
    _, state = next(itertools.islice(shuffled([7, 3], the_order, repeat=True), 100, None))
    cells = Cells(the_order.held_rows, goes_on=True)
    next(iter(StaggeredShuffle(partial(Numbers, [7, 3], True), cells, the_order, state=state)))
    assert cells.read <= parts * the_order.block_rows + 7 < 2 * the_order.capacity + 7


def test_a_unit_exchanges_a_part_of_what_is_held() -> None:
    """With a capacity of 64 batches a block has 10 batches, each of which is yielded in a different unit."""
    the_order = order(8, 8 * 64)
    assert (the_order.parts, the_order.block_rows, the_order.held_rows) == (10, 80, 440)
    batches = [batch for batch, _ in itertools.islice(shuffled([1], the_order, repeat=True), 300)]
    units = [batch for unit in range(10) for batch in batches[sum(range(unit + 1)) :][: unit + 1]]
    assert units == batches[:55], "the first units serve 1, 2, ... 10 batches"
    for start in range(55, 295, 10):
        blocks = [number // 80 for batch in batches[start : start + 10] for number in batch]
        newest = max(blocks)
        assert sorted(blocks) == [block for block in range(newest - 9, newest + 1) for _ in range(8)]


@pytest.mark.parametrize("batches", [2, 3, 5])
def test_a_buffer_of_few_batches_mixes_batches(batches: int) -> None:
    """Without a buffer larger than a batch nothing can be mixed across batches; two batches suffice to mix two."""
    found = [batch for batch, _ in itertools.islice(shuffled([9, 4], order(10, 10 * batches + 9), repeat=True), 40)]
    consecutive = [batch for batch in found if max(batch) - min(batch) == len(batch) - 1]
    assert len(consecutive) <= 2
    assert order(10, 10 * batches + 9).held_rows <= 10 * batches + 9


def old_order(rows: int, batch_size: int, capacity: int) -> list[Batch]:
    """Yield batches of a buffer that is filled, emptied in random order, and filled again."""
    generator = torch.Generator().manual_seed(0)
    found: list[Batch] = []
    for start in range(0, rows - capacity + 1, capacity):
        places = (start + torch.randperm(capacity, generator=generator)).tolist()
        found += [places[at : at + batch_size] for at in range(0, capacity, batch_size)]
    return found


def largest_jump(batches: list[Batch], window: int) -> float:
    """Return the largest difference of mean row number between adjacent windows of batches."""
    means = torch.tensor([sum(batch) / len(batch) for batch in batches])
    return max(
        float((means[at : at + window].mean() - means[at - window : at].mean()).abs())
        for at in range(window, len(means) - window)
    )


def test_the_distribution_of_the_batches_changes_slowly() -> None:
    """A complete refill replaces all documents in the buffer at once, a partial refill only some."""
    batch_size, capacity, rows = 16, 16 * 64, 16 * 64 * 8
    before = old_order(rows, batch_size, capacity)
    now = [batch for batch, _ in itertools.islice(shuffled([9, 4], order(batch_size, capacity), repeat=True), 500)]
    # A window of 8 batches moves on by 8 batches of text; the old one by a whole buffer of 64 at each refill.
    assert largest_jump(before, 8) > 0.9 * capacity
    assert largest_jump(now[55:], 8) < 0.5 * capacity


def test_a_batch_holds_rows_of_as_much_text_as_there_are_places() -> None:
    """A batch spans C rows of the stream with a complete refill, and r^2 batches < 2 C rows with partial refills."""
    batch_size, capacity = 16, 16 * 64
    now = [batch for batch, _ in itertools.islice(shuffled([9, 4], order(batch_size, capacity), repeat=True), 400)]
    spread = torch.tensor([float(torch.tensor(batch).float().std()) for batch in now[55:]]).mean()
    before = torch.tensor([float(torch.tensor(b).float().std()) for b in old_order(8 * capacity, batch_size, capacity)])
    assert spread > 1.3 * before.mean()


def test_orders_of_two_purposes_are_unrelated() -> None:
    one, other, again = (
        [
            number
            for batch, _ in itertools.islice(shuffled([5], order(8, 512, purpose=purpose), repeat=True), 200)
            for number in batch
        ]
        for purpose in ("windows", "activations", "windows")
    )
    assert one == again
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 0.02 * len(one)


def test_a_stream_that_became_shorter_is_noticed() -> None:
    the_order = order(2, 20)
    _, state = next(itertools.islice(shuffled([3] * 40, the_order), 25, None))
    with pytest.raises(UserError, match=r"^state must come from the same stream; got one from beyond the end of"):
        list(shuffled([3] * 3, the_order, state=state))


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        shuffled([3], order(2, 20), state={"upstream": None, "rows": 0, "block": 1, "batch": 2})
    assert str(caught.value) == (
        "state must have the keys upstream, rows, unit, batch; got upstream, rows, block, batch. It was written by a "
        "version of kronsae with another data order: continue with that version, or start again in a new folder."
    )
