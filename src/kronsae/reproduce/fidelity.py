"""The reviewers' first doubt (and appendix): how close mAND is to a binary AND."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.heads import KEYS, SHAPES, measured_heads
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, of

WEAK, ALLOWED = 0.1, 0.05
TOP = 0.1


def rows(context: Context) -> list[Row]:
    """Measure how often a kept latent has a negligible parent, and how often both parents are among their own best."""
    return measured_heads(context, _figures)


def _figures(one: Mapping[str, Any]) -> dict[str, Any]:
    fidelity = one["fidelity"]
    mass, both = ({float(at): share for at, share in fidelity[key]} for key in ("false_positive_mass", "both_top"))
    return {
        "false_positive_mass": mass[WEAK],
        "both_top": both[TOP],
        "balance_deviation": fidelity["balance_deviation"],
    }


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape."""
    columns = [
        Column(f"activation mass with a parent below {WEAK:g} of its mean", "false_positive_mass", "{:.2%}"),
        Column(f"activations with both parents among their top {TOP:.0%}", "both_top", "{:.1%}"),
        Column("deviation of the gate at a fixed product", "balance_deviation", "{:.3f}"),
    ]
    return means(found, KEYS, columns)


def verdict(found: Sequence[Row]) -> Verdict:
    """Ask whether activations that a binary AND would not allow carry little of the activation mass."""
    comparisons = []
    for m, n in SHAPES:
        rest = [ALLOWED - float(row["false_positive_mass"]) for row in of(found, d_base=m, d_extension=n)]
        what = f"{ALLOWED:.0%} minus the activation mass with a negligible parent at ({m}, {n})"
        comparisons.append(Comparison(what, rest, "{:+.2%}"))
    return judge(comparisons)


STUDY = Study(
    name="fidelity",
    title="How close mAND is to AND",
    of="a question of the paper's reviewers",
    claim="mAND behaves like a binary AND: a latent is rarely active where one of its parents is negligible "
    f"(here: below {WEAK:g} of the mean of its positive activations, on at most {ALLOWED:.0%} of the activation mass).",
    rows=rows,
    table=table,
    judge=verdict,
)
