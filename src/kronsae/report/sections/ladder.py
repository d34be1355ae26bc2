"""The section of ``kronsae eval ladder``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section, series_of

REVISION = 2
"""Increases when the structure of the result or the meaning of a metric changes."""

RUNGS: tuple[tuple[str, str, str], ...] = (
    ("encoded", "as encoded", "the encoder's own codes"),
    ("one_step", "one step", "the encoder's latents; one conjugate gradient step on their values"),
    ("best_values", "best values", "the encoder's latents with the non-negative values of least squared error"),
    ("pursuit", "pursuit", "two rounds among the encoder's 2k largest latents, each followed by a refit"),
    ("among_2k", "OMP, 2k", "orthogonal matching pursuit among the encoder's 2k largest latents"),
    ("among_4k", "OMP, 4k", "among its 4k largest latents"),
    ("among_all", "OMP, all", "among all latents: what this dictionary can explain, found greedily"),
)
PARTS: tuple[tuple[str, str, str], ...] = (
    ("values", "values", "EV lost because the encoder's values are not the best ones for its latents"),
    ("ranking", "ranking", "EV lost because its k largest latents are not the best of its 4k largest"),
    ("recall", "recall", "EV lost because better latents are not among its 4k largest"),
    ("dictionary", "dictionary", "EV that k latents of this dictionary do not explain, as far as OMP finds them"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Two tables, one row per SAE: the explained variances, and what the rest is lost by."""
    saes = kept["result"]["saes"]
    headings = [tuple((heading, about) for _, heading, about in parts) for parts in (RUNGS, PARTS)]
    rows = [
        tuple(
            TableRow(
                visible(name),
                tuple(Cell(f"{values[key]:.4f}") for key, *_ in parts),
                series_of(name, names),
            )
            for name, values in ((one["sae"], one[which]) for one in saes)
        )
        for parts, which in ((RUNGS, "ladder"), (PARTS, "lost_by"))
    ]
    worst = [
        f"{visible(one['sae'])} loses most by its {max(one['lost_by'], key=one['lost_by'].__getitem__)}."
        for one in saes
    ]
    return Section(
        key="ladder",
        title="What limits the reconstruction",
        paragraphs=(
            "Explained variance (EV) of the same dictionary with at most k active latents per token, from the "
            "encoder's codes to matching pursuit over all latents. Each step frees one thing from the encoder.",
            " ".join(worst),
        ),
        tables=(("SAE", Table(headings[0], rows[0])), ("EV lost by", Table(headings[1], rows[1]))),
        notes=(
            f"{saes[0]['ladder']['tokens']:,} held-out tokens; values are never negative. Matching pursuit is greedy: "
            "a dictionary may explain more than it finds.",
        ),
    )
