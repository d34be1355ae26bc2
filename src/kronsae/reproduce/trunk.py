"""Ours: a dense trunk, so that some latents have rows of their own."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce import variants
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study

SHARES = {"1/16": 16, "1/4": 4, "1/2": 2}
"""Shares of the latents that are the trunk's."""
CLAIMED = (("1/16", "kron-4x4"), ("1/4", "kron-2x4"), ("1/2", "kron-2x4"))
"""A trunk of this share with heads of (4, 4), and heads alone that it is to be above. The encoders have 53%, 63% and
75% of TopK's parameters, against 50%, 75% and 75%."""


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAEs with and without a trunk, plain and with pursuit."""
    sizes = {_name(share): context.scale.d_sae // part for share, part in SHARES.items()}
    saes = {name: context.sae("kron", d_base=4, d_extension=4, d_trunk=size) for name, size in sizes.items()}
    return variants.train(context, saes)


def _name(share: str) -> str:
    return f"trunk-{share.replace('/', '-of-')}"


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare heads with a trunk with heads alone, and with TopK."""
    pairs = [(_name(share), without, f"EV with a trunk of {share}") for share, without in CLAIMED]
    return variants.verdict(found, pairs)


STUDY = Study(
    name="trunk",
    title="A dense trunk",
    of="beyond the paper",
    claim="Where some latents have rows of their own, and the others are cells of (4, 4), a KronSAE reconstructs "
    "better than heads alone whose encoder is about as large or larger.",
    rows=rows,
    table=variants.table,
    judge=verdict,
    limits="Equal tokens, one learning rate for all. docs/method.md defines the trunk.",
)
