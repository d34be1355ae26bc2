"""Table 6: TopK and JumpReLU, dense and inside KronSAE."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import RECONSTRUCTION, Column, Comparison, judge, means, minus, of

NAMES = ("topk", "jumprelu", "kron", "jumprelu-kron")


def rows(context: Context) -> list[Row]:
    """Train the four SAEs; JumpReLU's penalty is adjusted to reach the k of the others."""
    half = context.sae("jumprelu", d_base=2, d_extension=4)
    specs = [context.sae("topk"), context.sae("jumprelu"), context.sae("kron"), half]
    return context.train([f"{spec} name={name}" for spec, name in zip(specs, NAMES, strict=True)])


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    return means(found, [Column("SAE", "name", "{}")], RECONSTRUCTION)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare TopK with JumpReLU inside KronSAE, and dense."""
    topk, jumprelu, kron, both = (of(found, name=name) for name in NAMES)
    return judge(
        [Comparison("EV of KronSAE with TopK minus KronSAE with JumpReLU", minus(kron, both))],
        f" {Comparison('EV of dense TopK minus dense JumpReLU', minus(topk, jumprelu))}.",
    )


STUDY = Study(
    name="jumprelu",
    title="TopK and JumpReLU",
    of="table 6",
    claim="JumpReLU inside KronSAE reconstructs worse than TopK inside KronSAE.",
    paper="""| l0 | TopK | JumpReLU | KronSAE, TopK | KronSAE, JumpReLU |
|---|---|---|---|---|
| 32 | .809 | .813 | .814 | .790 |
| 50 | .837 | .838 | .840 | .817 |
| 64 | .852 | .844 | .853 | .828 |""",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The paper fits a parabola over penalty coefficients; here the coefficient is adjusted during training "
    "until l0 reaches k. Compare l0 in the table.",
)
