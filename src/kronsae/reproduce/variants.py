"""Encoders that are compared plain and with pursuit; `null_symbols` and `trunk` differ in the encoders only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.tables import ENCODER, RECONSTRUCTION, SPLICED, Column, Comparison, judge, means, minus, of

WORDS = {"": "", "-pursuit": " pursuit_rounds=2 pursuit_candidates=2"}
"""What is added to a specification, by the suffix of the SAE's name."""
CODES = {"": "plain", "-pursuit": "with pursuit"}


def train(context: Context, saes: Mapping[str, str]) -> list[Row]:
    """Train TopK, KronSAEs of (2, 4) and (4, 4), and the given SAEs, plain and with pursuit.

    Args:
        context: trains them.
        saes: specification by name.
    """
    specs = {
        "topk": context.sae("topk"),
        "kron-2x4": context.sae("kron"),
        "kron-4x4": context.sae("kron", d_base=4, d_extension=4),
        **saes,
    }
    return context.train(
        [f"{spec}{words} name={name}{suffix}" for suffix, words in WORDS.items() for name, spec in specs.items()]
    )


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per SAE."""
    return means(found, [Column("SAE", "name", "{}")], [ENCODER, *RECONSTRUCTION, SPLICED])


def verdict(found: Sequence[Row], pairs: Sequence[tuple[str, str, str]]) -> Verdict:
    """Compare SAEs with those that they are to be above, and with TopK.

    Args:
        found: rows of `train`.
        pairs: name of an SAE, name of the one that it is to be above, and what is compared, in words.
    """
    claimed: list[Comparison] = []
    more: list[Comparison] = []
    for suffix, words in CODES.items():
        topk = of(found, name=f"topk{suffix}")
        for name, without, what in pairs:
            own, other = of(found, name=name + suffix), of(found, name=without + suffix)
            claimed.append(Comparison(f"{what} minus that of {without}, {words}", minus(own, other)))
            more.append(Comparison(f"{what} minus TopK's, {words}", minus(own, topk)))
    return judge(claimed, f" {'; '.join(map(str, more))}.")
