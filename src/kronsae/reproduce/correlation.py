"""Figure 6: correlation of latents within a head and between heads, before and after training."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.heads import KEYS, SHAPES, measured_heads, pairs
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, of

COLUMNS = tuple(
    Column(f"{when}, {whose}, {kind}", f"{which}_{key}_{kind}", "{:.3f}")
    for which, when in (("kept", "after TopK"), ("composed", "before TopK"))
    for key, whose in (("trained", "trained"), ("twin", "untrained"))
    for kind in ("within", "between")
)


def rows(context: Context) -> list[Row]:
    """Measure Pearson's r of pairs of latents."""
    return measured_heads(context, lambda one: pairs(one, "kept") | pairs(one, "composed"))


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape."""
    return means(found, KEYS, COLUMNS)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare r within a head with r between heads, and with r within a head of an untrained twin."""
    comparisons = []
    for m, n in SHAPES:
        own = of(found, d_base=m, d_extension=n)
        for other, words in (("trained_between", "between heads"), ("twin_within", "within a head without training")):
            gaps = [float(row["kept_trained_within"]) - float(row[f"kept_{other}"]) for row in own]
            comparisons.append(Comparison(f"r within a head minus r {words} at ({m}, {n})", gaps, "{:+.3f}"))
    return judge(comparisons)


STUDY = Study(
    name="correlation",
    title="Correlation within heads",
    of="figure 6",
    claim="Latents of one head are more correlated than latents of different heads, and training raises the "
    "correlation within a head.",
    rows=rows,
    table=table,
    judge=verdict,
)
