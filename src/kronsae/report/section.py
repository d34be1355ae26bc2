"""A section of the page for one measurement: words, tables, charts."""

from __future__ import annotations

from dataclasses import dataclass

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
