from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from kronsae.data.prefetch import Prefetched
from kronsae.support.errors import UserError


def test_items_come_in_order_and_from_a_thread() -> None:
    made_by = set()

    def stream() -> Iterator[int]:
        for number in range(100):
            made_by.add(threading.current_thread().name)
            yield number

    assert list(Prefetched(stream())) == list(range(100))
    assert made_by == {"kronsae-prefetch"}


def test_no_more_than_the_depth_is_made_ahead() -> None:
    made: list[int] = []

    def stream() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = iter(Prefetched(stream(), depth=2))
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]  # with the consumer, two ready, one waiting for room


def test_an_error_comes_at_its_place() -> None:
    def stream() -> Iterator[int]:
        yield 1
        raise UserError("the shard is damaged")

    items = iter(Prefetched(stream()))
    assert next(items) == 1
    with pytest.raises(UserError, match="the shard is damaged"):
        next(items)


def test_the_thread_ends_with_the_iteration() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    before = threading.active_count()
    items = iter(Prefetched(endless()))
    next(items)
    assert threading.active_count() == before + 1
    del items
    assert threading.active_count() == before
