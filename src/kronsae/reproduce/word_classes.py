"""Absorption with human labels: the parts of speech of words, in place of their first letters."""

from __future__ import annotations

from collections.abc import Sequence

from kronsae.measures.absorption import AbsorptionSettings
from kronsae.reproduce.absorption import compared, measured, table
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.probing import labels
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import judge


def rows(context: Context) -> list[Row]:
    """Measure absorption by parts of speech, at the scale's k."""
    return measured(context, AbsorptionSettings(labels=labels(context, "parts-of-speech")), (context.scale.k,))


def verdict(found: Sequence[Row]) -> Verdict:
    """Compare KronSAE's mean absorption fraction with TopK's: lower."""
    comparisons, ratios = compared(found)
    first = found[0]
    gate = f"At least {first['needed']} of {first['classes']} classes need an accurate probe"
    return judge(comparisons, f" {ratios}. {gate}; {first['accurate_classes']} have one.")


STUDY = Study(
    name="word-classes",
    title="Absorption with human labels",
    of="figures 4 and 11, with human labels",
    claim="KronSAE absorbs less than TopK also where the classes are parts of speech.",
    rows=rows,
    table=table,
    judge=verdict,
    limits="The paper has first letters only. A word is read at its last token. At the bundled scale, whose text has "
    "no parts of speech, the classes are the roles of names in Python code, as in the study absorption.",
)
