"""Figures 3 and 10: explained variance against sparsity."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

CLOSE = 0.01
"""A loss of EV up to which two SAEs count as close."""


def specs(context: Context, kind: str, ks: Sequence[int]) -> str:
    """Return an SAE with each k; ``absorption`` and ``layers`` take theirs from here, so they are trained once."""
    return f"{context.sae(kind, k='{' + ','.join(map(str, ks)) + '}')} name={kind}"


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAE with every k."""
    found = context.train([specs(context, kind, context.scale.l0s) for kind in ("topk", "kron")])
    return [{**row, "name": row["name"].partition("-")[0]} for row in found]


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per k and SAE."""
    ordered = sorted(found, key=lambda row: (int(row["k"]), str(row["name"]) != "topk"))
    return means(ordered, [Column("k", "k", "{}"), Column("SAE", "name", "{}")], [*RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE with TopK at every k."""
    comparisons = [
        Comparison(
            f"EV of KronSAE minus TopK's at k = {k}",
            minus(of(found, name="kron", k=k), of(found, name="topk", k=k)),
            above=-CLOSE,
        )
        for k in dict.fromkeys(row["k"] for row in found)
    ]
    return judge(comparisons)


STUDY = Study(
    name="sparsity",
    title="Explained variance and sparsity",
    of="figures 3 and 10",
    claim=f"KronSAE's EV is close to TopK's or above it at every l0 (here: at most {CLOSE:g} below).",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Equal tokens, one learning rate for both; M = 2, N = 4.",
)
