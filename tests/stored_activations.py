"""A small stream of numbered activations, and folders of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kronsae.data.buffer import Activations
from kronsae.data.manifest import MANIFEST, Manifest
from kronsae.data.store import write_activations
from kronsae.data.stream import State
from kronsae.support.sealed import sealed

WIDTHS = {"a": 2, "b": 1}
ROW_BYTES = 12
"""Bytes of a row of both hooks in float32."""


class Numbered:
    """Yield consecutively numbered rows; hook "a" has width 2, hook "b" width 1, with the negative number.

    Args:
        items, rows: number of items, and rows in each.
        state: state of an item; iteration resumes after it.
    """

    def __init__(self, items: int = 20, rows: int = 7, *, state: State | None = None) -> None:
        self._items, self._rows = items, rows
        self._first = 0 if state is None else state["item"]

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        for item in range(self._first, self._items):
            numbers = torch.arange(item * self._rows, (item + 1) * self._rows, dtype=torch.float32)[:, None]
            yield {"a": numbers.expand(-1, 2), "b": -numbers}, {"item": item + 1}


def numbered(*, state: State | None = None) -> Numbered:
    """Return 140 rows in 20 items."""
    return Numbered(state=state)


def store(folder: Path | str, make: Any = numbered, **options: Any) -> Manifest:
    """Write 100 rows into 4 shards of 30 rows, unless ``options`` say otherwise."""
    given: dict[str, Any] = {"d_in": WIDTHS, "tokens": 100, "shard_bytes": 30 * ROW_BYTES, "metadata": {"model": "m"}}
    return write_activations(make, folder, **given | options)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(values: Activations) -> list[int]:
    """Return the numbers of rows."""
    return [int(number) for number in values["a"][:, 0]]


def change_manifest(folder: Path, **changes: Any) -> None:
    """Change fields of the manifest as a writer would, with a right digest."""
    path = folder / MANIFEST
    fields = json.loads(path.read_text()) | changes
    del fields["sha256"]
    path.write_text(sealed(fields))


def as_first_format(folder: Path) -> None:
    """Turn a float folder into one of the first format."""
    path = folder / MANIFEST
    fields = json.loads(path.read_text()) | {"format": "kronsae-activations-1"}
    for key in ("sha256", "shard_bytes"):
        del fields[key]
    fields["metadata"] = {
        key: value
        for key, value in fields["metadata"].items()
        if key not in ("hooks", "model_batch", "window_pool_tokens", "seed")
    }
    fields["shards"] = [{key: shard[key] for key in ("file", "tokens", "sha256")} for shard in fields["shards"]]
    path.write_text(json.dumps(fields, indent=2) + "\n")
