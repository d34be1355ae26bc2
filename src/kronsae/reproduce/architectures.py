"""Ten architectures with a dense and a Kronecker encoder, on the same batches."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

KINDS = ("topk", "batch_topk", "jumprelu", "matryoshka", "switch")


def rows(context: Context) -> list[Row]:
    """Train every architecture."""
    specs = []
    for kind in KINDS:
        specs.append(f"{context.sae(kind)} name={kind}")
        own = "kron" if kind == "topk" else kind
        specs.append(f"{context.sae(own, d_base=2, d_extension=4)} name={kind}-kron")
    return context.train(specs)


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per architecture."""
    return means(found, [Column("SAE", "name", "{}")], [ENCODER, *RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare each Kronecker encoder with the dense one."""
    comparisons = [
        Comparison(
            f"EV of {kind} with a Kronecker encoder minus dense",
            minus(of(found, name=f"{kind}-kron"), of(found, name=kind)),
        )
        for kind in KINDS
    ]
    return judge(comparisons)


STUDY = Study(
    name="architectures",
    title="All architectures",
    of="section 2",
    claim="The Kronecker encoder can replace the dense one in every architecture without losing EV.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Equal tokens, one learning rate for all; M = 2, N = 4.",
)
