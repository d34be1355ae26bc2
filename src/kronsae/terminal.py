"""How every verb talks: options that all share, figures on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kronsae.report.comparison import Table

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, made by `kronsae train`.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]


def print_json(value: Any) -> None:
    """The figures, as JSON on stdout."""
    print(json.dumps(value, indent=2))


def print_table(table: Any) -> None:
    """A rich table (or anything rich shows) on stdout, wide where nobody looks at a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def rich_table(heading: str, table: Table) -> Any:
    """A table of the page for the terminal; ``heading`` is that of its first column."""
    from rich.table import Table as RichTable

    shown = RichTable(heading, *(name for name, _ in table.headings), box=None)
    for row in table.rows:
        shown.add_row(row.name, *(cell.text for cell in row.cells))
    return shown


def say(line: str) -> None:
    """A line for the person, on stderr."""
    print(line, file=sys.stderr)


def what_now(*commands: str) -> None:
    """What one does next, on stderr."""
    say("What now? " + "; ".join(commands))
