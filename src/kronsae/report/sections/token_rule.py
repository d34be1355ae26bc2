"""The section of ``kronsae eval token-rule``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section, mean_text, series_of

REVISION = 1
"""Of the kept result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("balanced accuracy", "of calling a place active or not; mean over latents ± standard deviation; 0.5 is guessing"),
    ("AUC", "how often the rule ranks an active place above another; mean over latents ± standard deviation"),
    ("latents", "latents with a rule; of those active often enough in both texts to be drawn"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """One row per SAE."""
    config, saes = kept["settings"]["config"], kept["result"]["saes"]
    return Section(
        key="token-rule",
        title="How far nearby tokens tell",
        paragraphs=(
            "For each of some latents drawn at random, a simple rule learned from the tokens around a place, in "
            "training documents, whether the latent is active there; it was tested on held-out documents. A latent "
            "that stands for certain tokens is near 1; one that depends on more than which tokens are near is lower.",
            " ".join(f"{visible(one['sae'])}: AUC {mean_text(one['auc'])}." for one in saes),
        ),
        tables=(("SAE", Table(_HEADINGS, tuple(_row(one, names) for one in saes))),),
        notes=(
            f"Logistic regression on the tokens up to {config['near']} away with their offset and up to "
            f"{config['radius']} away with their side; up to {config['examples']:,} places of either kind from each "
            f"text; seed {config['seed']}.",
        ),
    )


def _row(one: Mapping[str, Any], names: Sequence[str]) -> TableRow:
    cells = (
        Cell(mean_text(one["balanced_accuracy"])),
        Cell(mean_text(one["auc"])),
        Cell(f"{one['auc']['n']:,} of {one['eligible']:,}"),
    )
    return TableRow(visible(one["sae"]), cells, series_of(one["sae"], names))
