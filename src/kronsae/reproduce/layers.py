"""Figure 12: explained variance at several layers."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.sparsity import CLOSE
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAE at every layer of the scale."""
    found: list[Row] = []
    for hook in context.scale.layers:
        trained = context.train([f"{context.sae(kind)} name={kind}" for kind in ("topk", "kron")], hook=hook)
        found += [{**row, "hook": hook} for row in trained]
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per layer and SAE."""
    return means(found, [Column("hook", "hook", "{}"), Column("SAE", "name", "{}")], [*RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE with TopK at each layer."""
    comparisons = [
        Comparison(
            f"EV of KronSAE minus TopK's at {hook}",
            minus(of(found, hook=hook, name="kron"), of(found, hook=hook, name="topk")),
            above=-CLOSE,
        )
        for hook in dict.fromkeys(row["hook"] for row in found)
    ]
    return judge(comparisons)


STUDY = Study(
    name="layers",
    title="Layers",
    of="figure 12",
    claim=f"KronSAE's EV is close to TopK's or above it at every layer (here: at most {CLOSE:g} below).",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Equal tokens, one learning rate for both; M = 2, N = 4.",
)
