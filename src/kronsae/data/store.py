"""Write activations to disk as safetensors shards with a manifest, so that an interruption costs at most one shard.

A folder contains ``activations-00000.safetensors``, ... with one tensor ``[tokens, d_in]`` per hook (and for int8 one
of scales, see `kronsae.data.precision`), and ``manifest.json`` (`kronsae.data.manifest`) with the format, dtype, number
of tokens, width of every hook, size and SHA-256 of every shard, and the writer's metadata on the model and the text.

After each shard, ``progress.json`` is written with the shards so far and the state of the stream behind them; the same
call continues from there. The manifest is written last and takes the place of the progress, so a folder with a manifest
is complete. `kronsae.data.stored` reads a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors.torch import save_file
from torch import Tensor

from kronsae.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Manifest,
    Progress,
    Shard,
    manifest_text,
    progress_text,
    read_progress,
)
from kronsae.data.places import Place, open_place
from kronsae.data.precision import LostVariance, check_precision, layout, narrow, token_bytes
from kronsae.data.shuffle import START, BlockReader
from kronsae.data.stream import MakeStream
from kronsae.support.errors import UserError
from kronsae.support.files import sha256

SHARD_BYTES = 2**27
"""Size of a shard over all hooks, 128 MB: a harvest holds one in memory, and loses at most one if it is killed."""

SHARD_PREFIX = "activations-"

_SAFETENSORS_UNFINISHED = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Name of the file that safetensors writes before it renames it; a SIGKILL leaves it behind."""


def write_activations(
    make_stream: MakeStream[Mapping[str, Tensor]],
    folder: Path | str,
    *,
    d_in: Mapping[str, int],
    tokens: int,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "float32",
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the first ``tokens`` rows of a stream into a folder, or continue an interrupted call.

    Files are written atomically. If the process is killed or an error occurs, the complete shards stay, and the same
    call continues after them; the folder is then the same, byte for byte, as without the interruption. A finished
    folder is left as it is. A local folder is locked meanwhile.

    Args:
        make_stream: Makes the stream of activations by hook, such as ``partial(ActivationStream, model, hooks, ...)``.
        folder: Folder to write into: a local path or a URL that fsspec opens.
        d_in: Width of the activations, by hook, as in the stream.
        tokens: Number of rows to write.
        shard_bytes: Size of a shard over all hooks, without its header; memory is about twice as much.
        dtype: Precision on disk: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"int8"`` with a scale per token and
            hook.
        metadata: Metadata for the manifest, which must be representable as JSON. It belongs to the settings: a folder
            with other metadata is not continued.
        progress: Called with the rows in complete shards and of all rows, after each shard.

    Raises:
        UserError: If the folder holds something else, another process is writing to it, the stream has too few rows, or
            a value exceeds the dtype's range.
    """
    settings = harvest_settings(tokens=tokens, shard_bytes=shard_bytes, dtype=dtype, metadata=metadata)
    place = open_place(folder)
    place.check(0)
    with place.lock():
        found = read_progress(place, settings)
        if isinstance(found, Manifest):
            _remove_others(place, [MANIFEST, *(shard.file for shard in found.shards)])
            return found
        done = found or Progress(settings=settings, shards=(), position=START)
        _remove_others(place, [PROGRESS, *(shard.file for shard in done.shards)])
        rows = _ShardRows(d_in, dtype, shard_rows(d_in, dtype, shard_bytes))
        reader = BlockReader(make_stream, rows, done.position)
        while done.tokens < tokens:
            shard = _write_shard(place, rows, reader, len(done.shards), done.tokens, tokens)
            done = Progress(settings=settings, shards=(*done.shards, shard), position=reader.position)
            _write_text(place, PROGRESS, progress_text(done))
            progress(done.tokens, tokens)
        manifest = Manifest(
            format=FORMAT,
            dtype=dtype,
            tokens=tokens,
            shard_bytes=shard_bytes,
            d_in=dict(d_in),
            shards=done.shards,
            metadata=dict(metadata or {}),
        )
        _write_text(place, MANIFEST, manifest_text(manifest))
        place.remove(PROGRESS)
    return manifest


def harvest_settings(
    *, tokens: int, shard_bytes: int, dtype: str, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what must be the same for a harvest to be continued, as JSON values, after checking it."""
    check_precision(dtype)
    if tokens < 1 or shard_bytes < 1:
        raise UserError(f"tokens and shard_bytes must be at least 1; got {tokens} and {shard_bytes}.")
    settings = {"dtype": dtype, "tokens": tokens, "shard_bytes": shard_bytes, **(metadata or {})}
    return dict(json.loads(json.dumps(settings)))


def shard_rows(d_in: Mapping[str, int], dtype: str, shard_bytes: int) -> int:
    """Return the number of rows in a full shard, at least one."""
    return max(1, shard_bytes // token_bytes(d_in, dtype))


def stored_bytes(d_in: Mapping[str, int], dtype: str, tokens: int, shard_bytes: int) -> tuple[int, int]:
    """Return the number of shards, and the exact total of their sizes, which includes the headers of the files."""
    rows = shard_rows(d_in, dtype, shard_bytes)
    whole, rest = divmod(tokens, rows)
    size = whole * _file_bytes(d_in, dtype, rows) + (_file_bytes(d_in, dtype, rest) if rest else 0)
    return whole + bool(rest), size


def _file_bytes(d_in: Mapping[str, int], dtype: str, rows: int) -> int:
    """Return the size of a shard: 8 bytes, the header (JSON without spaces, padded to 8 bytes), and the values.

    The values of larger types come first, and those of one type by name; this determines the offsets in the header.
    """
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int8": "I8"}
    header, end = {}, 0
    tensors = layout(d_in, dtype)
    for name in sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name)):
        shape, kind = tensors[name]
        start, end = end, end + rows * kind.itemsize * (shape[0] if shape else 1)
        header[name] = {"dtype": names[str(kind)], "shape": [rows, *shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


class _ShardRows:
    """Hold the rows of one shard in the precision of the disk; implements `kronsae.data.shuffle.RowStore`.

    Rows come in the order of the slots, and start again at slot 0 with each shard.
    """

    def __init__(self, d_in: Mapping[str, int], dtype: str, capacity: int) -> None:
        self.d_in = d_in
        self.dtype = dtype
        self.capacity = capacity
        self.lost = LostVariance()
        self._storage: dict[str, Tensor] = {}

    def count(self, item: Mapping[str, Tensor]) -> int:
        return len(next(iter(item.values())))

    def put(self, item: Mapping[str, Tensor], start: int, slots: Int64[Tensor, "N"]) -> None:
        widths = {hook: values.shape[1] for hook, values in item.items()}
        if widths != dict(self.d_in):
            raise UserError(f"d_in must be the widths of the stream's hooks; got {dict(self.d_in)} with {widths}.")
        if int(slots[0]) == 0:
            self.lost = LostVariance()
        rows = {hook: values[start : start + len(slots)] for hook, values in item.items()}
        stored: dict[str, Tensor] = {}
        for hook, values in rows.items():
            stored |= narrow(values, hook, self.dtype)
        for name, part in stored.items():
            if name not in self._storage:
                self._storage[name] = part.new_empty((self.capacity, *part.shape[1:]))
            self._storage[name][slots] = part
        if self.dtype != "float32":
            self.lost.add(rows, stored)

    def take(self, slots: Int64[Tensor, "N"]) -> dict[str, Tensor]:
        """Return a view of the first rows, as many as there are slots."""
        return {name: block[: len(slots)] for name, block in self._storage.items()}


def _write_shard(
    place: Place,
    rows: _ShardRows,
    reader: BlockReader[Mapping[str, Tensor]],
    number: int,
    done: int,
    tokens: int,
) -> Shard:
    """Read a shard from the stream, write its file, and return its entry in the manifest."""
    slots = torch.arange(min(rows.capacity, tokens - done))
    count = reader.read(slots)
    if count < len(slots):
        raise UserError(
            f"tokens must not exceed the number of tokens in the text; got {tokens} with {done + count}. "
            "Give more text, or fewer tokens and another folder."
        )
    file = f"{SHARD_PREFIX}{number:05d}.safetensors"
    written: dict[str, Any] = {}

    def fill(path: Path) -> None:
        save_file(rows.take(slots), path)
        written.update(sha256=sha256(path), bytes=path.stat().st_size)

    place.write(file, fill)
    return Shard(file=file, tokens=count, lost_variance=rows.lost.shares(), **written)


def _write_text(place: Place, file: str, text: str) -> None:
    place.write(file, lambda path: path.write_text(text, encoding="utf-8"))


def _remove_others(place: Place, keep: list[str]) -> None:
    """Remove files of a killed harvest: unfinished ones, and a shard that is not in its progress."""
    for name in place.sizes():
        ours = name.startswith((SHARD_PREFIX, f".{SHARD_PREFIX}", f".{PROGRESS}.", f".{MANIFEST}.", PROGRESS))
        if (ours or _SAFETENSORS_UNFINISHED.fullmatch(name)) and name not in keep:
            place.remove(name)
