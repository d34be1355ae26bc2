"""Block sizes of the kernels of the GPU path: a rule, and a table of measured sizes that takes precedence.

``kronsae bench gpu`` measures the candidates on a device and writes the table; the launches of `kronsae.kernels.gpu`
read it. The table is one JSON file for all devices: ``KRONSAE_BLOCKS``, or else ``blocks.json`` in the cache folder
(``KRONSAE_CACHE``). Sizes do not change what is computed, but sums over a row may be added in another order: results
repeat bit for bit under one table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from kronsae.support.cache import cache_root
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import read_json, write_json

KERNELS: Final = (
    "weighted_rows",
    "sampled_products",
    "gradient_rows",
    "row_squares",
    "head_bounds",
    "expand",
    "adamw",
)
ENVIRONMENT: Final = "KRONSAE_BLOCKS"
FORMAT: Final = 1
MAX_BYTES: Final = 2**20
MAX_ELEMENTS: Final = 2**14  # of a tile; more does not fit into a program's registers
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Blocks:
    """Sizes of one launch: a tile of ``rows`` x ``block`` elements in a program of ``num_warps`` warps."""

    block: int
    rows: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Key:
    """What a table's entry is for: a kernel, a dtype, and the width of its rows, rounded up to a power of two."""

    kernel: str
    dtype: str
    width: int


Table = Mapping[str, Mapping[Key, Blocks]]
"""Entries by name of the device."""

_forced: ContextVar[Mapping[str, Blocks]] = ContextVar("kronsae_blocks", default=MappingProxyType({}))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``; ``number >= 1``."""
    return 1 << (number - 1).bit_length()


def default_blocks(key: Key) -> Blocks:
    """Return the sizes by rule: 4 to 16 elements per thread, so that no kernel spills; whole rows where they fit."""
    if key.kernel == "head_bounds":
        rows = max(1, 2048 // key.width)
        return Blocks(key.width, rows, _warps(rows * key.width, 16))
    if key.kernel == "sampled_products":
        block = min(256, key.width)
        return Blocks(block, 8, _warps(8 * block, 16))
    if key.kernel == "adamw":
        largest = 2048 if key.dtype == "float64" else 4096
        block = min(largest, key.width)
        return Blocks(block, 1, _warps(block, largest // 256))
    block = min(1024 if key.kernel == "row_squares" else 512, key.width)
    return Blocks(block, 1, _warps(block, 4))


def _warps(elements: int, per_thread: int) -> int:
    """Return a number of warps (of 32 threads) with at most ``per_thread`` elements for each thread."""
    return min(16, max(1, elements // (32 * per_thread)))


def candidates(key: Key) -> list[Blocks]:
    """Return the sizes that are worth measuring; the default is the first."""
    if key.kernel == "head_bounds":
        tiles = [(key.width, max(1, elements // key.width)) for elements in (1024, 2048, 4096)]
    elif key.kernel == "sampled_products":
        tiles = [(min(block, key.width), rows) for block in (128, 256, 512) for rows in (4, 8, 16)]
    elif key.kernel == "adamw":
        tiles = [(min(block, key.width), 1) for block in (1024, 2048, 4096)]
    else:
        tiles = [(min(block, key.width), 1) for block in (256, 512, 1024, 2048)]
    found = [
        Blocks(block, rows, warps)
        for block, rows in tiles
        for warps in (1, 2, 4, 8, 16)
        if 2 <= block * rows / (32 * warps) <= 16
    ]
    return list(dict.fromkeys([default_blocks(key), *found]))


@contextmanager
def force(blocks: Mapping[str, Blocks]) -> Iterator[None]:
    """Launch the kernels named inside the block with these sizes, for measurements."""
    token = _forced.set(blocks)
    try:
        yield
    finally:
        _forced.reset(token)


def blocks_for(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Blocks:
    """Return the sizes of a launch: those forced, else the table's for this device, else those by rule."""
    forced = _forced.get().get(kernel)
    if forced is not None:
        return forced
    key = Key(kernel, str(dtype).removeprefix("torch."), power_of_two(width))
    return _kept(table_path()).get(device_name(device), {}).get(key) or default_blocks(key)


def device_name(device: torch.device) -> str:
    """Return the name under which a device's sizes are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table_path() -> Path:
    """Return the table's path; the file need not exist, unless the environment names it."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not Path(named).is_file():
            raise UserError(f"{ENVIRONMENT} must name a table of block sizes; there is no file '{named}'. Unset it.")
        return Path(named)
    return cache_root() / "blocks.json"


@cache
def _kept(path: Path) -> Table:
    return read_table(path) if path.exists() else {}


def write_table(path: Path, device: str, measured: Mapping[Key, Blocks]) -> None:
    """Keep the measured sizes of one device; the file's other entries stay."""
    kept = {name: dict(entries) for name, entries in (read_table(path) if path.exists() else {}).items()}
    kept.setdefault(device, {}).update(measured)
    devices = {
        name: [asdict(key) | asdict(blocks) for key, blocks in entries.items()] for name, entries in kept.items()
    }
    write_json(path, {"format": FORMAT, "devices": devices})
    _kept.cache_clear()


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        UserError: the file is missing, damaged, of another format, or holds sizes that no kernel can be launched with.
    """
    value = read_json(path, "table of block sizes", max_bytes=MAX_BYTES)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("devices"), dict):
        raise UserError(f"'{path}' must be a table of block sizes of format {FORMAT}. {REMEDY}")
    table: dict[str, dict[Key, Blocks]] = {}
    for device, entries in value["devices"].items():
        if not isinstance(entries, list):
            raise UserError(f"'{path}' must hold a list of block sizes for '{device}'. {REMEDY}")
        table[device] = dict(_entry(entry, f"'{path}', entry {at} of '{device}',") for at, entry in enumerate(entries))
    return table


REMEDY: Final = "Delete it, or measure again: kronsae bench gpu --only tune"


def _entry(entry: Any, where: str) -> tuple[Key, Blocks]:
    fields = ("kernel", "dtype", "width", "block", "rows", "num_warps")
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise UserError(f"{where} must have the keys {', '.join(fields)}. {REMEDY}")
    for name, known in (("kernel", KERNELS), ("dtype", DTYPES)):
        if entry[name] not in known:
            message = f"{where} must have a {name} among {', '.join(known)}; got {entry[name]!r}."
            raise UserError(f"{message}{nearest(str(entry[name]), known)} {REMEDY}")
    for name, most in (("width", 2**20), ("block", MAX_ELEMENTS), ("rows", MAX_ELEMENTS), ("num_warps", 32)):
        number = entry[name]
        if type(number) is not int or not 1 <= number <= most or number & (number - 1):
            raise UserError(f"{where} must have a power of two up to {most:,} as {name}; got {number!r}. {REMEDY}")
    key, blocks = Key(*(entry[name] for name in fields[:3])), Blocks(*(entry[name] for name in fields[3:]))
    if blocks.block * blocks.rows > MAX_ELEMENTS:
        raise UserError(f"{where} must have a tile of at most {MAX_ELEMENTS:,} elements. {REMEDY}")
    if key.kernel == "head_bounds" and blocks.block != key.width:
        raise UserError(f"{where} must have block equal to width, a head; got {blocks.block} and {key.width}. {REMEDY}")
    return key, blocks
