"""Split the work of a compiled loop into parts and run them on as many threads as PyTorch may use."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
PARTS_PER_THREAD = 4  # threads take parts as they become free, so rows with many entries do not delay the others

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _drop_pool() -> None:
    """Drop the pool after a fork: a child process has none of its parent's threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_pool)


def _get_pool(helpers: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < helpers:
            _pool, _pool_size = ThreadPoolExecutor(helpers, "kronsae-kernels"), helpers
        return _pool


def run_parts(kernel: Callable[..., object], bounds: Sequence[int], *arguments: Any) -> None:
    """Call ``kernel(start, stop, *arguments)`` for each pair of neighbours in ``bounds``, on all threads."""
    parts = iter([(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop])

    def work() -> None:
        for start, stop in parts:  # taking the next part is atomic under the GIL
            kernel(start, stop, *arguments)

    helpers = min(torch.get_num_threads(), len(bounds) - 1) - 1
    if helpers < 1:
        return work()
    pool = _get_pool(helpers)
    futures = [pool.submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        future.result()
    return None


def split_evenly(items: int) -> list[int]:
    """Return the boundaries of parts of equal size."""
    parts = max(1, min(items, PARTS_PER_THREAD * torch.get_num_threads()))
    return [items * part // parts for part in range(parts + 1)]


def split_by_work(offsets: Array, per_row: int) -> list[int]:
    """Return the boundaries of parts with about equal work, where a row costs ``per_row`` and each entry 1."""
    rows = len(offsets) - 1
    work = offsets + per_row * np.arange(rows + 1)
    parts = max(1, min(rows, PARTS_PER_THREAD * torch.get_num_threads()))
    inner = np.searchsorted(work, work[-1] * np.arange(1, parts) // parts)
    return [0, *map(int, inner), rows]
