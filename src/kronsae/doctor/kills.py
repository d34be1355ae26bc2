"""Kill tiny runs with SIGKILL at random moments, let them resume, and compare the ends with uninterrupted runs."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kronsae.doctor.processes import Ended, run, victims_of
from kronsae.doctor.work import KINDS, Kind
from kronsae.support.errors import UserError

MOST_KILLS_OF_A_RUN = 4
EVALUATED = ("explained_variance", "mean_squared_error", "l0", "ce_recovered")
TIMES = ("seconds", "member_seconds")
"""Metrics that differ between two runs of the same config."""


@dataclass
class Kills:
    """What came of the kills of one kind.

    Args:
        kind: name in `KINDS`.
        kills: processes, or teams of them, that were killed before they ended.
        runs: runs, each killed at least once unless it was too quick, and resumed until its end.
        identical: runs whose end has the same bits as that of the uninterrupted run.
        largest_difference: largest difference of a value from that run.
        while_writing: kills that left an unfinished file or checkpoint behind.
        after_a_checkpoint: kills after which there was a checkpoint (of a harvest: a shard) to resume from.
        failures: what went wrong, a sentence each.
    """

    kind: str
    kills: int = 0
    runs: int = 0
    identical: int = 0
    largest_difference: float = 0.0
    while_writing: int = 0
    after_a_checkpoint: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Where a campaign works: its folder, text and harvested activations."""

    folder: Path
    text: Path
    activations: Path

    def start(self, kind: Kind, out: Path, **options: Any) -> Ended:
        """Run the work of a kind into a folder."""
        log = self.folder / f"{out.name}.log"
        return run(kind.work, self.text, self.activations, out, log=log, ranks=kind.ranks, **options)


def reference(bench: Bench, name: str) -> tuple[Path, float]:
    """Return the folder of an uninterrupted run of a kind, and its seconds.

    Raises:
        UserError: it fails.
    """
    out = bench.folder / f"{name}-whole"
    ended = bench.start(KINDS[name], out)
    if not ended.finished:
        raise UserError(f"the uninterrupted run of '{name}' must succeed; it ended with {_told(ended)}")
    return out, ended.seconds


def kill(
    bench: Bench,
    name: str,
    whole: Path,
    seconds: float,
    kills: int,
    draw: random.Random,
    progress: Callable[[int], None],
) -> Kills:
    """Kill runs of a kind at so many random moments in all, and compare each with the uninterrupted one.

    Args:
        bench: where to work.
        name: name of the kind.
        whole: folder of the uninterrupted run.
        seconds: its time.
        kills: number of kills.
        draw: source of the moments: uniform over this time after each start.
        progress: receives the number of kills so far.
    """
    kind, found = KINDS[name], Kills(name)
    expected = contents(name, whole)
    while found.kills < kills and not found.failures:
        out = bench.folder / f"{name}-{found.runs}"
        found.runs += 1
        for _ in range(min(draw.randint(1, MOST_KILLS_OF_A_RUN), kills - found.kills)):
            victims = victims_of(kind.ranks, draw)
            ended = bench.start(kind, out, kill_after=draw.uniform(0, seconds), victims=victims)
            if ended.hung:
                found.failures.append(f"after a kill in run {found.runs} of '{name}', another process did not end.")
            if not ended.killed:
                break
            found.kills += 1
            found.while_writing += _is_unfinished(out)
            found.after_a_checkpoint += _has_checkpoint(out)
            progress(found.kills)
        ended = bench.start(kind, out)
        if not ended.finished:
            found.failures.append(f"run {found.runs} of '{name}' did not resume: {_told(ended)}")
            continue
        difference = largest_difference(expected, contents(name, out))
        found.identical += difference == 0
        found.largest_difference = max(found.largest_difference, difference)
        if difference > kind.tolerance:
            found.failures.append(f"run {found.runs} of '{name}' differs by {difference:.3g} from the whole one.")
    return found


def contents(name: str, folder: Path) -> dict[str, Any]:
    """Return what two runs of a kind must have in common: all tensors, metrics without times, state of the data."""
    if name == "harvest":
        return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("sae_weights.safetensors")):
        found |= {f"{path.parent.relative_to(folder)}/{key}": value for key, value in _tensors(path).items()}
    for path in sorted(folder.rglob("checkpoint/step-*")):
        where = path.relative_to(folder)
        found |= {f"{where}/{key}": value for key, value in _state(path).items() if not key.endswith("/seconds")}
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        found |= {f"{where}/{key}": progress[key] for key in ("step", "tokens", "stream")}
    for path in sorted(folder.rglob("metrics.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = {key: value for key, value in json.loads(line).items() if key not in TIMES}
            found |= {f"{path.relative_to(folder)}/{number}/{key}": value for key, value in row.items()}
    for path in sorted(folder.glob("sweep.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for number, csv_row in enumerate(csv.DictReader(file)):
                found |= {f"sweep.csv/{number}/{key}": csv_row[key] for key in ("name", "seed", *EVALUATED)}
    return found


def largest_difference(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """Return the largest difference of a number; infinite if anything else differs."""
    if expected.keys() != found.keys():
        return float("inf")
    return max((_difference(value, found[key]) for key, value in expected.items()), default=0.0)


def _difference(one: Any, other: Any) -> float:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        worst = 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())
    elif isinstance(one, float) and isinstance(other, float):
        worst = abs(one - other)
    else:
        worst = 0.0 if type(one) is type(other) and one == other else float("inf")
    return float("inf") if math.isnan(worst) else worst


def _state(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, the chunks of several processes one by one."""
    if not (checkpoint / "layout.json").exists():
        return _tensors(checkpoint / "state.safetensors")
    layout = json.loads((checkpoint / "layout.json").read_text(encoding="utf-8"))
    files = {path.name: _tensors(path) for path in checkpoint.glob("state-*.safetensors")}
    return {
        name if number == 0 else f"{name}/{number}": files[chunk["file"]][chunk["key"]]
        for name, about in layout["tensors"].items()
        for number, chunk in enumerate(about["chunks"])
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no __iter__)


def _is_unfinished(out: Path) -> bool:
    return any(path.name.startswith(".") and path.name != ".lock" for path in out.rglob(".*"))


def _has_checkpoint(out: Path) -> bool:
    return any(out.rglob("checkpoint/step-*")) or any(out.glob("progress.json"))


def _told(ended: Ended) -> str:
    lines = ended.said.strip().splitlines()
    return f"exit status {', '.join(map(str, ended.statuses))} ({lines[-1] if lines else 'no message'})."
