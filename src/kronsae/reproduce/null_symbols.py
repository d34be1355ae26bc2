"""Ours: heads in which a base or an extension may be absent."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

PAIRS = (("kron-2x2-null", "kron-4x4"), ("kron-1x1-null", "kron-2x4"))
"""Heads with null symbols, and heads without them whose encoder is as large or larger."""
PURSUIT = " pursuit_rounds=2 pursuit_candidates=2"


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAEs with and without null symbols, plain and with pursuit."""
    size = context.scale.d_sae
    specs = {
        "topk": context.sae("topk"),
        "kron-2x4": context.sae("kron"),
        "kron-4x4": context.sae("kron", d_base=4, d_extension=4),
        "kron-2x2-null": context.sae("kron", d_base=2, d_extension=2, null_symbols="true"),
        "kron-1x1-null": context.sae("kron", d_sae=size // 3 * 3, d_base=1, d_extension=1, null_symbols="true"),
    }
    both = {
        name + suffix: spec + words
        for suffix, words in (("", ""), ("-pursuit", PURSUIT))
        for name, spec in specs.items()
    }
    return context.train([f"{spec} name={name}" for name, spec in both.items()])


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    return means(found, [Column("SAE", "name", "{}")], [ENCODER, *RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare heads with null symbols with heads without, and with TopK."""
    claimed: list[Comparison] = []
    more: list[Comparison] = []
    for suffix, words in (("", "plain"), ("-pursuit", "with pursuit")):
        topk = of(found, name=f"topk{suffix}")
        for null, without in PAIRS:
            own, other = of(found, name=null + suffix), of(found, name=without + suffix)
            claimed.append(Comparison(f"EV of {null} minus that of {without}, {words}", minus(own, other)))
            more.append(Comparison(f"EV of {null} minus TopK's, {words}", minus(own, topk)))
    return judge(claimed, f" {'; '.join(map(str, more))}.")


STUDY = Study(
    name="null-symbols",
    title="Null symbols",
    of="beyond the paper",
    claim="Heads with null symbols reconstruct better than heads without them whose encoder is as large or larger.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Equal tokens, one learning rate for all. docs/method.md defines null symbols.",
)
