"""Table 1: the gate that composes a base and an extension."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

SHAPES = ((2, 4), (4, 8))
GATES = "mand,relu_product,raw_product,minimum"


def rows(context: Context) -> list[Row]:
    """Train a KronSAE of each shape with each gate."""
    return context.train(
        [f"{context.sae('kron', d_base=m, d_extension=n)} gate={{{GATES}}} name=kron-{m}x{n}" for m, n in SHAPES]
    )


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape and gate."""
    keys = [Column("M", "d_base", "{}"), Column("N", "d_extension", "{}"), Column("gate", "gate", "{}")]
    return means(found, keys, [*RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare mAND with the two products of the table."""
    comparisons = []
    for m, n in SHAPES:
        mand = of(found, d_base=m, gate="mand")
        for gate, words in (("relu_product", "ReLU(u) ReLU(v)"), ("raw_product", "u v")):
            what = f"EV of mAND minus that of {words} at ({m}, {n})"
            comparisons.append(Comparison(what, minus(mand, of(found, d_base=m, gate=gate))))
    return judge(comparisons)


STUDY = Study(
    name="gates",
    title="The gate",
    of="table 1",
    claim="mAND reaches a higher EV than ReLU(u) ReLU(v), and this a higher one than u v.",
    paper="""| F | M, N | mAND | ReLU(u) ReLU(v) | u v |
|---|---|---|---|---|
| 32,768 | 2, 4 | 0.8336 | 0.8267 | 0.8237 |
| 32,768 | 4, 8 | 0.8220 | 0.8191 | 0.8143 |
| 65,536 | 2, 4 | 0.8445 | 0.8328 | 0.8297 |
| 65,536 | 4, 8 | 0.8350 | 0.8297 | 0.8251 |

Qwen-2.5-1.5B, 125M tokens, EV.""",
    rows=rows,
    table=table,
    judge=verdict,
)
