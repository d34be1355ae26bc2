"""Figure 18: properties of latents compared with those of their base and extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.interaction.structure import OF_PARENTS, PROPERTIES
from kronsae.reproduce.claims import Row, Verdict
from kronsae.reproduce.context import Context
from kronsae.reproduce.heads import KEYS, SHAPES, measured_heads
from kronsae.reproduce.study import Study
from kronsae.reproduce.tables import Column, Comparison, judge, markdown_rows, of

WORDS = {"base": "base", "extension": "extension", "mean": "mean", "product": "product", "mand": "mAND"}


def rows(context: Context) -> list[Row]:
    """Measure Pearson's r between each property of a latent and functions of its parents' properties."""
    return measured_heads(context, _figures)


def _figures(one: Mapping[str, Any]) -> dict[str, Any]:
    r = one["inheritance"]["r"]
    return {f"{property_}_{against}": r[property_][against] for property_ in PROPERTIES for against in OF_PARENTS}


def table(found: Sequence[Row]) -> list[str]:
    """Return one line per shape and property."""
    lines = []
    for m, n in SHAPES:
        own = of(found, d_base=m, d_extension=n)
        for name in PROPERTIES:
            cells = [Column("", f"{name}_{against}", "{:.2f}").cell(own) for against in OF_PARENTS]
            lines.append([str(m), str(n), name.replace("_", " "), *cells])
    headings = [key.heading for key in KEYS]
    return markdown_rows([*headings, "property", *(f"r with {WORDS.get(one, one)}" for one in OF_PARENTS)], lines)


def verdict(found: Sequence[Row]) -> Verdict:
    """Ask whether each property correlates with the product of the parents' properties."""
    comparisons = []
    for m, n in SHAPES:
        own = of(found, d_base=m, d_extension=n)
        for name in PROPERTIES:
            values = [row[f"{name}_product"] for row in own]
            if all(value is not None for value in values):
                what = f"r of the {name.replace('_', ' ')} with the product of the parents' at ({m}, {n})"
                comparisons.append(Comparison(what, [float(value) for value in values], "{:+.2f}"))
    return judge(comparisons)


STUDY = Study(
    name="inheritance",
    title="Properties of latents and of their parents",
    of="figure 18",
    claim="Properties of a latent, such as its frequency, follow from those of its base and extension: they correlate "
    "with the product and the mAND of the parents' properties.",
    rows=rows,
    table=table,
    judge=verdict,
)
