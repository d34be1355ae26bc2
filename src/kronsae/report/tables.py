"""Rendering of report tables for the terminal and for Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kronsae.report.comparison import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def rich_table(found: Table, first: str) -> RichTable:
    """Return the table for a terminal; ``first`` is the heading of the names. Brackets in names are not markup."""
    from rich.table import Column
    from rich.table import Table as RichTable
    from rich.text import Text

    headings = (first, *(heading for heading, _ in found.headings))
    shown = RichTable(*(Column(Text(heading)) for heading in headings), box=None)
    for row in found.rows:
        shown.add_row(*map(Text, (row.name, *(cell.text for cell in row.cells))))
    return shown


def markdown_table(found: Table, first: str) -> str:
    """Return the table in Markdown; ``first`` is the heading of the names."""
    headings = [first, *(heading for heading, _ in found.headings)]
    lines = [headings, ["---"] * len(headings), *([row.name, *(cell.text for cell in row.cells)] for row in found.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
