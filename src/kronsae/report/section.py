"""A section of the page for one measurement: words, tables, charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.report.charts import Chart
from kronsae.report.comparison import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page shows of one measurement.

    Args:
        key: short, unique on the page; its address is ``#measure-<key>``.
        title: the heading.
        paragraphs: plain text, what was measured and what came out; the template escapes it.
        tables: heading of the first column, and the table.
        charts: their series are numbered as the page's SAEs are.
        notes: small print, such as sizes and seeds.
    """

    key: str
    title: str
    paragraphs: tuple[str, ...]
    tables: tuple[tuple[str, Table], ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()


def mean_text(mean: Mapping[str, Any]) -> str:
    """A kept `kronsae.eval.scores.Mean` in words: the mean, and the standard deviation where there is one."""
    if mean["mean"] is None:
        return "–"
    return f"{mean['mean']:.3f}" + ("" if mean["std"] is None else f" ± {mean['std']:.3f}")


def series_of(sae: str, names: Sequence[str]) -> int | None:
    """The number of an SAE's colour on a page with these SAEs; None for one that is not on it."""
    return list(names).index(sae) if sae in names else None
