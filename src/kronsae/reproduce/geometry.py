"""Figure 19: whether decoder rows cluster by base or by extension."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.decoder_map import draw_map
from kronsae.reproduce.heads import KEYS, SHAPES, measured_heads, pairs
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, means, of

KINDS = {"same_base": "same base", "same_extension": "same extension", "neither": "neither", "between": "other head"}


def rows(context: Context) -> list[Row]:
    """Measure the cosines of pairs of decoder rows."""
    return measured_heads(context, lambda one: pairs(one, "directions"))


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape."""
    columns = [Column(f"cosine, {words}", f"directions_trained_{kind}", "{:.3f}") for kind, words in KINDS.items()]
    columns += [Column(f"untrained, {KINDS[kind]}", f"directions_twin_{kind}", "{:.3f}") for kind in list(KINDS)[:2]]
    return means(found, KEYS, columns)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare the cosine at equal base with that at equal extension: above if M < N, below if M >= N."""
    comparisons = []
    for m, n in SHAPES:
        near, far = ("same_base", "same_extension") if m < n else ("same_extension", "same_base")
        gaps = [
            float(row[f"directions_trained_{near}"]) - float(row[f"directions_trained_{far}"])
            for row in of(found, d_base=m, d_extension=n)
        ]
        comparisons.append(Comparison(f"cosine at {KINDS[near]} minus at {KINDS[far]}, ({m}, {n})", gaps, "{:+.3f}"))
    return judge(comparisons)


STUDY = Study(
    name="geometry",
    title="Geometry of the decoder",
    of="figure 19",
    claim="In a map of the decoder rows, latents cluster by their base when M < N, and by their extension when M >= N.",
    rows=rows,
    table=table,
    judge=verdict,
    draw=draw_map,
    limits="The verdict is on cosines of pairs of decoder rows, because the paper's map shows no figure.",
)
