"""Table 4 and the choice of M and N: explained variance by the shape of the heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, Column, Comparison, judge, means, minus, of

SHAPES = ((2, 4), (4, 4), (4, 8), (8, 8))


def rows(context: Context) -> list[Row]:
    """Train KronSAEs of one size with larger and larger heads."""
    return context.train([f"{context.sae('kron', d_base=m, d_extension=n)} name=kron-{m}x{n}" for m, n in SHAPES])


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape."""
    keys = [Column("M", "d_base", "{}"), Column("N", "d_extension", "{}"), Column("heads", "num_heads", "{:,}")]
    return means(found, keys, [ENCODER, *RECONSTRUCTION])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare each shape with the next larger one."""
    comparisons = []
    for (m, n), (p, q) in itertools.pairwise(SHAPES):
        own, larger = of(found, d_base=m, d_extension=n), of(found, d_base=p, d_extension=q)
        comparisons.append(Comparison(f"EV of ({m}, {n}) minus that of ({p}, {q})", minus(own, larger)))
    return judge(comparisons)


STUDY = Study(
    name="shapes",
    title="The shape of heads",
    of="table 4 and the advice on M and H",
    claim="Small heads and many of them reconstruct best: EV falls as M and N grow at a fixed number of latents.",
    paper="""| M, N | 4, 4 | 4, 8 | 8, 8 | 8, 16 | 16, 16 |
|---|---|---|---|---|---|
| EV | .845 | .824 | .815 | .812 | .799 |

Qwen-2.5-1.5B, 32,768 latents.""",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Table 4 compares widths of several Pythia models at 512 heads; here one model and one size are used.",
)
