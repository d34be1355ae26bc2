"""Ours: a dense trunk, so that some latents have rows of their own."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

SHARES = {"1/16": 16, "1/4": 4, "1/2": 2}
"""Shares of the latents that are the trunk's."""
PURSUIT = " pursuit_rounds=2 pursuit_candidates=2"
CLAIMED = (("1/16", "kron-4x4"), ("1/4", "kron-2x4"), ("1/2", "kron-2x4"))
"""A trunk of this share with heads of (4, 4), and heads alone that it is to be above. The encoders have 53%, 63% and
75% of TopK's parameters, against 50%, 75% and 75%."""


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAEs with and without a trunk, plain and with pursuit."""
    specs = {
        "topk": context.sae("topk"),
        "kron-2x4": context.sae("kron"),
        "kron-4x4": context.sae("kron", d_base=4, d_extension=4),
    }
    for share, part in SHARES.items():
        specs[_name(share)] = context.sae("kron", d_base=4, d_extension=4, d_trunk=context.scale.d_sae // part)
    both = {
        name + suffix: spec + words
        for suffix, words in (("", ""), ("-pursuit", PURSUIT))
        for name, spec in specs.items()
    }
    return context.train([f"{spec} name={name}" for name, spec in both.items()])


def _name(share: str) -> str:
    return f"trunk-{share.replace('/', '-of-')}"


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    return means(found, [Column("SAE", "name", "{}")], [ENCODER, *RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare heads with a trunk with heads alone, and with TopK."""
    claimed: list[Comparison] = []
    more: list[Comparison] = []
    for suffix, words in (("", "plain"), ("-pursuit", "with pursuit")):
        topk = of(found, name=f"topk{suffix}")
        for share, without in CLAIMED:
            own, other = of(found, name=_name(share) + suffix), of(found, name=without + suffix)
            claimed.append(
                Comparison(f"EV with a trunk of {share} minus that of {without}, {words}", minus(own, other))
            )
            more.append(Comparison(f"EV with a trunk of {share} minus TopK's, {words}", minus(own, topk)))
    return judge(claimed, f" {'; '.join(map(str, more))}.")


STUDY = Study(
    name="trunk",
    title="A dense trunk",
    of="beyond the paper",
    claim="Where some latents have rows of their own, and the others are cells of (4, 4), a KronSAE reconstructs "
    "better than heads alone whose encoder is about as large or larger.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="Equal tokens, one learning rate for all. docs/method.md defines the trunk.",
)
