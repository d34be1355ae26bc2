"""Manifest and progress of a folder of activations: JSON files that contain a digest of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kronsae.data.places import Place, open_place
from kronsae.data.precision import PRECISIONS
from kronsae.data.stream import State
from kronsae.support.config import differences
from kronsae.support.errors import UserError
from kronsae.support.sealed import sealed, unsealed

FORMAT = "kronsae-activations-2"
FIRST_FORMAT = "kronsae-activations-1"
"""Format of earlier versions: float32, bfloat16 or float16, a manifest without sizes and without a digest of itself."""

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard.

    Args:
        file: Name of the file.
        tokens: Number of rows.
        sha256: Digest of the file.
        bytes: Size of the file; None in the first format.
        lost_variance: `LostVariance` of its rows, by hook; empty for float32.
    """

    file: str
    tokens: int
    sha256: str
    bytes: int | None = None
    lost_variance: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a folder of activations.

    Args:
        format: Name and version of the format.
        dtype: Precision on disk.
        tokens: Total number of rows in all shards.
        shard_bytes: Size for which the shards were made; None in the first format.
        d_in: Width of the activations, by hook.
        shards: The shards, in the order in which they were harvested.
        metadata: The writer's metadata: model, text, context length, seed, ...
    """

    format: str
    dtype: str
    tokens: int
    shard_bytes: int | None = None
    d_in: dict[str, int]
    shards: tuple[Shard, ...]
    metadata: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for: a harvest with other settings gives another folder."""
        return {"dtype": self.dtype, "tokens": self.tokens, "shard_bytes": self.shard_bytes, **self.metadata}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of an unfinished harvest after a shard.

    Args:
        settings: As in `Manifest`.
        shards: The shards that are complete.
        position: Position of the `BlockReader` behind them.
    """

    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    position: State

    @property
    def tokens(self) -> int:
        """Number of rows in the complete shards."""
        return sum(shard.tokens for shard in self.shards)


def damaged(where: str) -> UserError:
    """Return the error for a file that is not as it was written."""
    return UserError(
        f"'{where}' must be unchanged since it was written; it is damaged. Restore it from a copy, or remove the "
        "folder and harvest again."
    )


def read_manifest(folder: Path | str | Place) -> Manifest:
    """Return the manifest of a folder or URL, after checking that its files exist and have the right size.

    Raises:
        UserError: The manifest or one of its files is missing, damaged or of another format.
    """
    place = folder if isinstance(folder, Place) else open_place(folder)
    sizes = place.sizes()
    if MANIFEST not in sizes:
        if PROGRESS in sizes:
            raise UserError(
                f"folder must contain a finished harvest; the one in '{place}' was interrupted. Run the same `kronsae "
                "harvest` command again to finish it."
            )
        raise UserError(
            f"folder must contain harvested activations; '{place}' has no {MANIFEST}. Harvest into it first."
        )
    manifest = _parsed(place)
    for shard in manifest.shards:
        check_size(place, shard, sizes)
    return manifest


def check_size(place: Place, shard: Shard, sizes: Mapping[str, int]) -> None:
    """Raise if the file of a shard is missing or has another size."""
    if shard.file not in sizes:
        raise UserError(
            f"folder must contain every shard of {MANIFEST}; '{place.name_of(shard.file)}' is missing. Restore it from "
            "a copy, or remove the folder and harvest again."
        )
    if shard.bytes is not None and sizes[shard.file] != shard.bytes:
        raise damaged(place.name_of(shard.file))


def _parsed(place: Place) -> Manifest:
    where = place.name_of(MANIFEST)
    content = place.read(MANIFEST)
    try:
        found = json.loads(content)
        kind = found["format"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise damaged(where) from error
    if kind not in (FORMAT, FIRST_FORMAT):
        raise UserError(
            f"{MANIFEST} must have the format {FORMAT} or {FIRST_FORMAT}; got '{kind}' in '{where}'. Harvest again, or "
            "read it with the version that wrote it."
        )
    fields = found if kind == FIRST_FORMAT else _unsealed(content, where)
    try:
        manifest = Manifest(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
        is_valid = _is_valid(manifest)
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(where) from error
    if not is_valid:
        raise damaged(where)
    return manifest


def _is_valid(manifest: Manifest) -> bool:
    counts = [manifest.tokens, *manifest.d_in.values(), *(shard.tokens for shard in manifest.shards)]
    return (
        bool(manifest.shards and manifest.d_in)
        and manifest.dtype in PRECISIONS
        and all(type(count) is int and count > 0 for count in counts)
        and sum(shard.tokens for shard in manifest.shards) == manifest.tokens
        and all(type(shard.sha256) is str and Path(shard.file).name == shard.file for shard in manifest.shards)
        and isinstance(manifest.metadata, dict)
    )


def read_progress(place: Place, settings: Mapping[str, Any]) -> Manifest | Progress | None:
    """Return what is in the folder of a harvest with these settings: all of it, a part, or None if nothing is.

    Raises:
        UserError: The folder holds other files, a harvest with other settings, or damaged files.
    """
    sizes = place.sizes()
    found: Manifest | Progress | None = None
    if MANIFEST in sizes:
        found = read_manifest(place)
    elif PROGRESS in sizes:
        fields = _unsealed(place.read(PROGRESS), place.name_of(PROGRESS))
        try:
            found = Progress(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
        except (TypeError, KeyError) as error:
            raise damaged(place.name_of(PROGRESS)) from error
        for shard in found.shards:
            check_size(place, shard, sizes)
    elif strangers := [name for name in sizes if not name.startswith((".", "activations-"))]:
        raise UserError(
            f"out must be a new or empty folder, or hold a harvest; {place} contains other files, such as "
            f"'{strangers[0]}'. Give another folder, or remove it."
        )
    if found is not None and (changed := differences(found.settings, dict(settings))):
        raise UserError(
            f"out must be a new folder or hold a harvest with the same settings; {place} holds another one "
            f"({'; '.join(changed[:3])}{f'; and {len(changed) - 3} more' if len(changed) > 3 else ''}). Give another "
            "folder, or remove it."
        )
    return found


def manifest_text(manifest: Manifest) -> str:
    """Return the content of the manifest's file."""
    return sealed({**asdict(manifest), "shards": [asdict(shard) for shard in manifest.shards]})


def progress_text(progress: Progress) -> str:
    """Return the content of the progress file."""
    return sealed({**asdict(progress), "shards": [asdict(shard) for shard in progress.shards]})


def _unsealed(content: bytes, where: str) -> dict[str, Any]:
    """Return the fields of a sealed file; ``where`` names it in the message."""
    fields = unsealed(content)
    if fields is None:
        raise damaged(where)
    return fields
