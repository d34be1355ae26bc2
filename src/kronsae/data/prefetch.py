"""Iterate over a stream in a thread, a few items ahead of the consumer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")

DEPTH = 2
"""Items that are ready ahead; a third is in the making."""


class _End:
    """End of the stream, and the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetched(Generic[Item]):
    """Yield the items of a stream, made by a thread up to ``depth`` items ahead.

    Items and their order do not change, and an error of the stream is raised at the same place. With ``depth`` = 2, up
    to four items are in memory: one with the consumer, two ready, one in the making. The thread ends with the
    iteration.

    Args:
        stream: Any iterable. Only the thread iterates over it.
        depth: Number of items ready ahead, at least 1.
    """

    def __init__(self, stream: Iterable[Item], depth: int = DEPTH) -> None:
        self._stream = stream
        self._depth = depth

    def __iter__(self) -> Iterator[Item]:
        ready: Queue[Item | _End] = Queue(self._depth)
        stopped = Event()

        def make() -> None:
            end = _End()
            try:
                for item in self._stream:
                    ready.put(item)
                    if stopped.is_set():
                        return
            except BaseException as error:
                end = _End(error)
            ready.put(end)

        thread = Thread(target=make, name="kronsae-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if not isinstance(item, _End):
                    yield item
                elif item.error is None:
                    return
                else:
                    raise item.error
        finally:
            stopped.set()
            while thread.is_alive():  # a full queue would hold it up
                with suppress(Empty):
                    ready.get(timeout=0.01)
            thread.join()
