"""A section of the page for one measurement: text, tables, charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.report.charts import Chart
from kronsae.report.comparison import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """The section of one measurement.

    Args:
        key: short identifier, unique on the page; the section's anchor is ``#measure-<key>``.
        title: the heading.
        paragraphs: what was measured, and the results, as plain text; the template escapes it.
        tables: pairs of the heading of the first column and the table.
        charts: charts; their series have the same numbers as the page's SAEs.
        notes: notes in small print, such as sizes and seeds.
    """

    key: str
    title: str
    paragraphs: tuple[str, ...]
    tables: tuple[tuple[str, Table], ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()


def mean_text(mean: Mapping[str, Any]) -> str:
    """Format a stored `kronsae.eval.scores.Mean`: the mean, and the standard deviation if there is one."""
    if mean["mean"] is None:
        return "–"
    return f"{mean['mean']:.3f}" + ("" if mean["std"] is None else f" ± {mean['std']:.3f}")


def series_of(sae: str, names: Sequence[str]) -> int | None:
    """Return the index of an SAE's colour on a page with the SAEs ``names``; None if it is not on the page."""
    return list(names).index(sae) if sae in names else None
