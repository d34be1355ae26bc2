"""Ours: heads in which a base or an extension may be absent."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.reproduce import variants
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.study import Study

PAIRS = (("kron-2x2-null", "kron-4x4"), ("kron-1x1-null", "kron-2x4"))
"""Heads with null symbols, and heads without them whose encoder is as large or larger."""


def rows(context: Context) -> list[Row]:
    """Train TopK and KronSAEs with and without null symbols, plain and with pursuit."""
    size = context.scale.d_sae
    saes = {
        "kron-2x2-null": context.sae("kron", d_base=2, d_extension=2, null_symbols="true"),
        "kron-1x1-null": context.sae("kron", d_sae=size // 3 * 3, d_base=1, d_extension=1, null_symbols="true"),
    }
    return variants.train(context, saes)


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare heads with null symbols with heads without, and with TopK."""
    return variants.verdict(found, [(null, without, f"EV of {null}") for null, without in PAIRS])


STUDY = Study(
    name="null-symbols",
    title="Null symbols",
    of="beyond the paper",
    claim="Heads with null symbols reconstruct better than heads without them whose encoder is as large or larger.",
    rows=rows,
    table=variants.table,
    judge=verdict,
    limits="Equal tokens, one learning rate for all. docs/method.md defines null symbols.",
)
