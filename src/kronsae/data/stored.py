"""Read activations from a folder or URL written by `kronsae.data.store`, at random or in the order of the harvest."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronsae.data.buffer import Activations, EpochRows
from kronsae.data.manifest import Manifest, Shard, damaged, read_manifest
from kronsae.data.places import Place, check_cache, open_place
from kronsae.data.precision import layout, token_bytes, widen
from kronsae.data.prefetch import Prefetched
from kronsae.data.stream import State, check_state
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import sha256
from kronsae.support.resources import free_address_bytes

CHECKING_THREADS = 8
"""Shards whose SHA-256 is computed in parallel; more threads do not read faster."""

MAPPED_SHARDS = 64
"""Shards that are memory-mapped at a time; the system limits a process to 65,530 mappings."""

MAPPED_SHARE = 4
"""Where the address space is limited, shards take at most one part in so many of what is free at the first mapping; one
shard is mapped in any case."""

READ_ROWS = 4096
"""Rows of an item of `HarvestedRows`."""

RAW = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.float16, torch.int8: np.int8}
"""Types in which NumPy copies the rows; it has no bfloat16."""

Arrays = dict[str, npt.NDArray[Any]]


class StoredActivations:
    """Yield ``({hook: values_BD}, state)`` from a folder of activations, in random order.

    Every epoch has a new random order of all rows of all shards. The state is ``{"epoch", "next_batch"}``. A thread
    reads up to two batches ahead. Shards are memory-mapped and only the rows of a batch are copied, so memory is four
    batches (`kronsae.data.prefetch`), whatever the size of the folder; the system keeps parts of the files in memory
    that is free, and drops them when it is needed. Each shard's SHA-256 is compared with the manifest before the first
    batch, which reads every file once per process.

    Args:
        folder: Folder or URL written by ``write_activations``. A remote one must fit into the local cache.
        batch_size: Rows in a batch. Rows that do not fill the last batch of an epoch are dropped from that epoch.
        seed: Seed of the order.
        repeat: Whether to repeat the data indefinitely.
        device: Device of the batches.
        hooks: Hooks to read; None reads all harvested hooks.
        share: ``(i, n)`` reads rows i, i + n, i + 2n, ... of each batch: the share of one of n processes.
        state: State yielded with a batch; iteration resumes after that batch.

    Raises:
        UserError: If the folder or one of its files is missing or damaged, a hook is missing, there are fewer rows than
            ``batch_size``, or the state was written by an incompatible version.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        batch_size: int,
        seed: int = 0,
        repeat: bool = True,
        device: torch.device | str = "cpu",
        hooks: Sequence[str] | None = None,
        share: tuple[int, int] = (0, 1),
        state: State | None = None,
    ) -> None:
        self._shards = _Shards(folder, hooks, mmap_advice="MADV_RANDOM")
        self.manifest = self._shards.manifest
        check_cache(self._shards.place, sum(shard.bytes or 0 for shard in self.manifest.shards))
        self._device = torch.device(device)
        self._share = slice(share[0], None, share[1])
        self._rows = EpochRows(self.manifest.tokens, batch_size=batch_size, seed=seed, repeat=repeat, state=state)

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        for values, state in Prefetched(self._batches()):
            yield {hook: rows.to(self._device) for hook, rows in values.items()}, state

    def _batches(self) -> Iterator[tuple[Activations, State]]:
        self._shards.check_all()
        ends = np.cumsum([shard.tokens for shard in self.manifest.shards])
        for rows, state in self._rows:
            yield self._take(rows[self._share], ends), state

    def _take(self, rows: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Activations:
        """Return a copy of the given rows in float32; each shard is read in ascending order of its rows.

        Args:
            rows: Row indices, counted over all shards.
            ends: Cumulative number of rows at the end of each shard.
        """
        order = np.argsort(rows)
        ascending = rows[order]
        borders = np.searchsorted(ascending, ends)
        found = self._shards.empty(len(rows))
        start = 0
        for number, stop in enumerate(borders):
            if stop > start:
                within = ascending[start:stop] - (ends[number] - self.manifest.shards[number].tokens)
                self._shards.take(number, within, {name: array[start:stop] for name, array in found.items()})
            start = stop
        place_of = torch.from_numpy(np.argsort(order))
        return {hook: values[place_of] for hook, values in self._shards.widened(found).items()}


class HarvestedRows:
    """Yield ``({hook: values_ND}, state)``: all rows in the order in which they were harvested.

    A folder that was harvested with a window pool has the rows of a live run with the same seed, so that a
    `ShuffleBuffer` of this stream yields the batches of that run. The state is ``{"epoch", "row"}``. One shard is
    mapped at a time, and checked when it is opened. A remote shard is downloaded when it is needed.

    Args:
        folder: Folder or URL written by ``write_activations``.
        repeat: Whether to start again after the last row.
        device: Device of the rows.
        hooks: Hooks to read; None reads all harvested hooks.
        state: State yielded with an item; iteration resumes after that item.

    Raises:
        UserError: If the folder or one of its files is missing or damaged, a hook is missing, or the state was written
            by an incompatible version.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        repeat: bool = True,
        device: torch.device | str = "cpu",
        hooks: Sequence[str] | None = None,
        state: State | None = None,
    ) -> None:
        self._shards = _Shards(folder, hooks, mmap_advice="MADV_SEQUENTIAL", mapped=1)
        self.manifest = self._shards.manifest
        self._device = torch.device(device)
        self._repeat = repeat
        self._state: State = {"epoch": 0, "row": 0} if state is None else state
        check_state(self._state, ("epoch", "row"))

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        epoch, first = self._state["epoch"], self._state["row"]
        while True:
            begin = 0
            for number, shard in enumerate(self.manifest.shards):
                for start in range(max(0, first - begin), shard.tokens, READ_ROWS):
                    stop = min(start + READ_ROWS, shard.tokens)
                    copied = self._shards.empty(stop - start)
                    self._shards.take(number, np.arange(start, stop), copied)
                    rows = self._shards.widened(copied)
                    yield (
                        {hook: values.to(self._device) for hook, values in rows.items()},
                        {"epoch": epoch, "row": begin + stop},
                    )
                begin += shard.tokens
            if not self._repeat:
                return
            epoch, first = epoch + 1, 0


class _Shards:
    """The shards of a folder, mapped when they are needed; the least recently used mapping makes room for another.

    Args:
        folder: Folder or URL.
        hooks: Hooks to read; None: all.
        mmap_advice: Advice for the mappings. Without MADV_RANDOM, the system reads 128 KB around every row.
        mapped: Most shards mapped at a time; fewer where the address space is limited.
    """

    def __init__(
        self, folder: Path | str, hooks: Sequence[str] | None, *, mmap_advice: str, mapped: int = MAPPED_SHARDS
    ) -> None:
        self.place: Place = open_place(folder)
        self.manifest: Manifest = read_manifest(self.place)
        widths = self.manifest.d_in
        self._hooks = tuple(widths if hooks is None else hooks)
        for hook in self._hooks:
            if hook not in widths:
                raise UserError(
                    f"hooks must be among those harvested into {folder}: {', '.join(widths)}; got '{hook}'."
                    f"{nearest(hook, widths)}"
                )
        self._layout = layout({hook: widths[hook] for hook in self._hooks}, self.manifest.dtype)
        self._advice = getattr(mmap, mmap_advice, None)
        self._most = mapped
        self._mapped: int | None = None
        self._open: OrderedDict[int, Arrays] = OrderedDict()

    def check_all(self) -> None:
        """Compare the SHA-256 of every shard with the manifest."""
        with ThreadPoolExecutor(min(CHECKING_THREADS, os.cpu_count() or 1)) as threads:
            list(threads.map(self._checked, self.manifest.shards))

    def empty(self, rows: int) -> Arrays:
        """Return arrays for the stored tensors of so many rows, by name."""
        return {name: np.empty((rows, *shape), RAW[kind]) for name, (shape, kind) in self._layout.items()}

    def take(self, number: int, rows: npt.NDArray[np.int64], out: Arrays) -> None:
        """Copy rows of a shard, which is mapped if it is not, and checked before that.

        The arrays on the mapped file do not leave this method: one that is kept elsewhere would keep its mapping.
        """
        for name, array in self._opened(number).items():
            np.take(array, rows, axis=0, out=out[name], mode="clip")  # clip: without a copy

    def _opened(self, number: int) -> Arrays:
        """Return the tensors of a shard by name, as arrays on the mapped file."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if self._mapped is None:
            self._mapped = self._room_for()
        while True:
            while len(self._open) >= self._mapped:
                self._open.popitem(last=False)  # unmapped with its last array
            try:
                self._open[number] = self._map(self.manifest.shards[number])
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                if not self._open:
                    raise UserError(
                        f"the shards of {self.place} must be mapped into memory; the system refuses it for "
                        f"{self.manifest.shards[number].file}. Raise the limit of address space (`ulimit -v`)."
                    ) from error
                self._mapped = max(1, len(self._open) // 2)  # for good: other allocations need address space too
            else:
                return self._open[number]

    def _room_for(self) -> int:
        """Return how many shards may be mapped at a time."""
        free = free_address_bytes()
        if free is None:
            return self._most
        row_bytes = token_bytes(self.manifest.d_in, self.manifest.dtype)
        largest = max(shard.tokens for shard in self.manifest.shards) * row_bytes
        return max(1, min(self._most, free // MAPPED_SHARE // largest))

    def widened(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        """Return the activations by hook, float32, of copied rows."""
        tensors = {name: torch.from_numpy(array).view(self._layout[name][1]) for name, array in arrays.items()}
        return {hook: widen(tensors, hook) for hook in self._hooks}

    def _map(self, shard: Shard) -> Arrays:
        path = self._checked(shard)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header_bytes = int.from_bytes(mapped[:8], "little")
            where = self.place.name_of(shard.file)
            try:
                header = json.loads(mapped[8 : 8 + header_bytes])
                offsets = {name: 8 + header_bytes + header[name]["data_offsets"][0] for name in self._layout}
                shapes = {name: tuple(header[name]["shape"]) for name in self._layout}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise damaged(where) from error
        if self._advice is not None:
            mapped.madvise(self._advice)
        arrays: Arrays = {}
        for name, (shape, kind) in self._layout.items():
            if shapes[name] != (shard.tokens, *shape):
                raise damaged(where)
            count = shard.tokens * (shape[0] if shape else 1)
            try:
                flat = np.frombuffer(mapped, RAW[kind], count, offsets[name])
            except ValueError as error:
                raise damaged(where) from error
            arrays[name] = flat.reshape(shard.tokens, *shape)
        return arrays

    def _checked(self, shard: Shard) -> Path:
        """Return the path of a shard on this machine, after comparing its SHA-256 with the manifest."""
        path = self.place.local(shard.file, shard.bytes or 0, shard.sha256)
        if _matches(path, shard):
            return path
        if self.place.url is not None:  # the copy may be damaged, and not the original
            path.unlink(missing_ok=True)
            path = self.place.local(shard.file, shard.bytes or 0, shard.sha256)
            if _matches(path, shard):
                return path
            path.unlink(missing_ok=True)
        raise damaged(self.place.name_of(shard.file))


def _matches(path: Path, shard: Shard) -> bool:
    try:
        about = path.stat()
        return _sha256_at(path, about.st_size, about.st_mtime_ns, about.st_ino) == shard.sha256
    except OSError:
        return False


@cache
def _sha256_at(path: Path, size: int, modified_ns: int, inode: int) -> str:
    """Return the SHA-256 of a file, cached by size and time, so that a process reads each shard for it once."""
    return sha256(path)
