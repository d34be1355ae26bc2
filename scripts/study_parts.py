"""Functions shared by the studies that measure runs with several seeds."""

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
    """Train a run and return it; an interrupted run is resumed."""
    return execute(config, folder, show_progress=True, say=say)


def reconstruction(run: Run) -> dict[str, dict[str, Any]]:
    """Return the size, explained variance, dead share and l0 of every SAE on held-out text."""
    keys = ("d_sae", "encoder_parameters", "parameters", "explained_variance", "dead_share", "l0")
    return {row["name"]: {key: row[key] for key in keys} for row in run.compare(EV_TOKENS).rows}


def mean_and_range(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Return ``mean (minimum to maximum)`` as a table cell."""
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def side(
    values: Sequence[float], centre: float, less: str, more: str, mixed: str = "not the same sign in every seed"
) -> str:
    """Return ``less`` or ``more`` if the values of all seeds are on that side of ``centre``, and else ``mixed``."""
    if max(values) < centre:
        return f"{less} in every seed"
    return f"{more} in every seed" if min(values) > centre else mixed


def chance(seeds: int) -> str:
    """Return a sentence with the probability that all seeds are on the same side by chance."""
    probability = f"1/{2 ** (seeds - 1)}"
    return f"Without a true difference, all {seeds} seeds fall on the same side with a probability of {probability}."


def markdown_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def made_with(about: dict[str, Any], result: Path, results: str = "../results") -> str:
    """Return a sentence with the machine and commit of a result file; ``results`` is its folder seen from the page."""
    where = f"[all figures]({results}/{result.name})"
    return f"Measured on {about['cores']} core(s) of {about['processor']}, commit {about['commit']} ({where})."
