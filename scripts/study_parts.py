"""What the studies that measure runs of several seeds have in common."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.runs.config import RunConfig
from kronsae.runs.run import Run, execute
from kronsae.support.terminal import say

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
MEASUREMENTS = ROOT / "docs" / "measurements"
END = "<!-- /results -->"
EV_TOKENS = 16_384


def trained(config: RunConfig, folder: Path) -> Run:
    """The finished run; stopped, the same command carries on."""
    return execute(config, folder, show_progress=True, say=say)


def reconstruction(run: Run) -> dict[str, dict[str, Any]]:
    """Size, explained variance, dead share and l0 of every SAE on held-out text."""
    keys = ("d_sae", "encoder_parameters", "parameters", "explained_variance", "dead_share", "l0")
    return {row["name"]: {key: row[key] for key in keys} for row in run.compare(EV_TOKENS).rows}


def mean_and_range(values: Sequence[float], form: str = "{:.3f}") -> str:
    """``mean (least to most)``, as the cell of a table."""
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def side(values: Sequence[float], centre: float, less: str, more: str) -> str:
    """``less`` or ``more`` where every seed says so, else that there is no clear side."""
    if max(values) < centre:
        return f"{less} in every seed"
    return f"{more} in every seed" if min(values) > centre else "no clear side"


def chance(seeds: int) -> str:
    """What agreement of all seeds, as `side` says it, is worth."""
    return f"Where nothing differs, {seeds} seeds are all on one side one time in {2 ** (seeds - 1)}."


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def made_with(about: dict[str, Any], result: Path, results: str = "../results") -> str:
    """Machine and commit of a result file, as the end of a paragraph; ``results`` is the way there from the page."""
    where = f"[all figures]({results}/{result.name})"
    return f"On {about['cores']} core(s) of {about['processor']}, commit {about['commit']} ({where})."
