"""The section of ``kronsae eval token-rule``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section, mean_text, series_of

REVISION = 2
"""Revision of the stored result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("balanced accuracy", "of predicting activity; mean over latents ± standard deviation; chance is 0.5"),
    ("AUC", "probability of ranking active above inactive; mean over latents ± standard deviation; chance is 0.5"),
    ("latents", "latents with a rule, of those active often enough in both texts to be drawn"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section with one row per SAE."""
    config, saes = kept["settings"]["config"], kept["result"]["saes"]
    return Section(
        key="token-rule",
        title="Token rule: prediction from nearby tokens",
        paragraphs=(
            "For each of several random latents, a logistic regression was fitted on training documents to predict "
            "from the nearby tokens whether the latent is active. It was tested on held-out documents. Scores near 1 "
            "mean that nearby tokens determine the latent; lower scores mean that it depends on more than those.",
            " ".join(f"{visible(one['sae'])}: AUC {mean_text(one['auc'])}." for one in saes),
        ),
        tables=(("SAE", Table(_HEADINGS, tuple(_row(one, names) for one in saes))),),
        notes=(
            f"Features: tokens up to {config['near']} away, with their offset, and up to {config['radius']} away, with "
            f"their side. Up to {config['examples']:,} active and as many inactive places from each text. Seed "
            f"{config['seed']}.",
        ),
    )


def _row(one: Mapping[str, Any], names: Sequence[str]) -> TableRow:
    cells = (
        Cell(mean_text(one["balanced_accuracy"])),
        Cell(mean_text(one["auc"])),
        Cell(f"{one['auc']['n']:,} of {one['eligible']:,}"),
    )
    return TableRow(visible(one["sae"]), cells, series_of(one["sae"], names))
