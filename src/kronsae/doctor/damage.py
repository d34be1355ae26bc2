"""Flip single bits of stored files, or cut off their ends, and count what is noticed by reading them as a run does."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kronsae.core import checkpoint
from kronsae.data.manifest import read_progress
from kronsae.data.places import open_place
from kronsae.data.stored import HarvestedRows
from kronsae.runs.folder import RunFolder
from kronsae.support.errors import UserError
from kronsae.training.state import newest_checkpoint

HOW = ("flipped", "truncated")


@dataclass(frozen=True)
class Victim:
    """Files of a kind, and how a run reads them.

    Args:
        about: what they are, for the table.
        folder: their folder.
        files: names in it.
        read: reads the folder, and raises if something is wrong.
    """

    about: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]


@dataclass
class Damages:
    """What came of the damages of the files of a kind.

    Args:
        about: the files.
        how: ``"flipped"`` or ``"truncated"``.
        damages: number of damages.
        detected: those that were refused in one sentence that names the file.
        failures: the others, a sentence each.
    """

    about: str
    how: str
    damages: int = 0
    detected: int = 0
    failures: list[str] = field(default_factory=list)


def victims(folder: Path, *, stored: Path, unfinished: Path, runs: Mapping[str, Path]) -> list[Victim]:
    """Return copies in a folder of what runs left, sorted by what they are.

    Args:
        folder: an empty folder.
        stored: harvested activations.
        unfinished: an unfinished harvest.
        runs: finished runs with their checkpoints, by what these are to be called. Config, metrics, summary and SAE are
            those of the first.
    """
    for name, source in {"stored": stored, "unfinished": unfinished, **runs}.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".*"))
    shards = tuple(sorted(path.name for path in (folder / "stored").glob("*.safetensors")))
    settings = _settings_of(folder / "unfinished")
    found = [
        Victim("shard", folder / "stored", shards, _read_rows),
        Victim("manifest of a harvest", folder / "stored", ("manifest.json",), _read_rows),
        Victim(
            "progress of a harvest",
            folder / "unfinished",
            ("progress.json",),
            lambda path: read_progress(open_place(path), settings),
        ),
    ]
    for name in runs:
        newest = _only_newest(folder / name / "checkpoint")
        files = tuple(sorted(path.name for path in newest.iterdir()))
        found.append(Victim(name, newest, files, lambda path: newest_checkpoint(path.parent)))
    if not runs:
        return found
    run = folder / next(iter(runs))
    found.append(
        Victim("config, metrics and summary of a run", run, ("run.json", "metrics.jsonl", "training.json"), _read_run)
    )
    sae = next((run / "saes").iterdir())
    found.append(Victim("saved SAE", sae, (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE), checkpoint.load))
    return found


def _settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of an unfinished harvest."""
    settings: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))["settings"]
    return settings


def damage(
    found: Sequence[Victim], how: str, count: int, draw: random.Random, progress: Callable[[int], None]
) -> list[Damages]:
    """Damage files so many times, in turn of each kind, at uniformly random places, and read each; repair it after.

    Args:
        found: the files.
        how: ``"flipped"``: one bit; ``"truncated"``: at least the last byte is cut off.
        count: number of damages in all.
        draw: source of files and places.
        progress: receives the number of damages so far.
    """
    counts = {victim.about: Damages(victim.about, how) for victim in found}
    for number in range(count):
        victim = found[number % len(found)]
        path = victim.folder / draw.choice(victim.files)
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        broken = bytearray(whole[:place] if how == "truncated" else whole)
        if how == "flipped":
            broken[place] ^= 1 << bit
        _write(path, bytes(broken), 2 * number)
        outcome = counts[victim.about]
        outcome.damages += 1
        problem = _problem(victim, path)
        _write(path, whole, 2 * number + 1)
        if problem is None:
            outcome.detected += 1
        else:
            at = f"bit {bit} of byte {place}" if how == "flipped" else f"after byte {place}"
            outcome.failures.append(f"{path.name} ({victim.about}), {how} at {at} of {len(whole)}: {problem}")
        progress(number + 1)
    return list(counts.values())


def _problem(victim: Victim, path: Path) -> str | None:
    """Return what is wrong with the answer to a damaged file; None: it is refused in one sentence that names it."""
    try:
        victim.read(victim.folder)
    except UserError as error:
        if path.name not in str(error):
            return f"the message does not name the file: {error}"
        return None if "\n" not in str(error) else f"the message has several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__} instead of one sentence: {error}"
    return "it was not noticed"


def _write(path: Path, content: bytes, number: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(number, number))  # checksums are kept by time of change, whose clock has steps of milliseconds


def _read_rows(folder: Path) -> None:
    for _ in HarvestedRows(folder, repeat=False):
        pass


def _read_run(folder: Path) -> None:
    run = RunFolder(folder)
    _ = run.config, run.training, run.metrics()


def _only_newest(folder: Path) -> Path:
    """Remove all checkpoints but the newest, so that there is none to go back to."""
    *older, newest = sorted(folder.glob("step-*"))
    for path in older:
        shutil.rmtree(path)
    return newest
