"""Input and output shared by all verbs: common options, figures on stdout, all else on stderr, short errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kronsae.support.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, made by `kronsae train`.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]

USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])
"""Base class of command-line errors: from Click, or from the copy of Click in newer releases of Typer."""


def run_app(app: typer.Typer, name: str, words: Sequence[str] | None = None) -> None:
    """Run a command line; an invalid one raises a one-sentence `UserError`, like every other user error.

    Args:
        app: the verbs.
        name: name of the program in its help.
        words: arguments; None: those of the process.
    """
    try:
        status = app(words, prog_name=name, standalone_mode=False)
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no arguments: show the help
            cast(Any, error).show()
            sys.exit(2)
        raise UserError(_describe_error(error, name, sys.argv[1:] if words is None else words)) from None
    if isinstance(status, int) and status:
        sys.exit(status)


def _describe_error(error: Any, name: str, words: Sequence[str]) -> str:
    """Return the problem in one sentence, with the nearest known option or the given value, and where to find help."""
    path = name if error.ctx is None else error.ctx.command_path
    wrong = getattr(error, "option_name", None)
    said = " ".join(error.format_message().split()).rstrip(".")
    if error.ctx is not None and said.startswith("No such option"):
        known = [word for one in error.ctx.command.params for word in (*one.opts, *one.secondary_opts)]
        return f"`{path}` has no option {wrong}.{nearest(str(wrong), [*known, '--help'])} See `{path} --help`."
    names = getattr(getattr(error, "param", None), "opts", ())
    given = [word for option, word in pairwise(words) if option in names] if said.startswith("Invalid value") else []
    value = f"; got '{given[-1]}'" if given and repr(given[-1]) not in said else ""
    return f"{said[0].lower()}{said[1:]}{value}{'' if said.endswith('?') else '.'} See `{path} --help`."


def print_json(value: Any) -> None:
    """Print figures as JSON on stdout."""
    print(json.dumps(value, indent=2))


def print_table(table: RichTable, width: int = 200) -> None:
    """Print a rich table on stdout, about ``width`` columns wide if stdout is not a terminal.

    No figure is cut off. A table too wide for the terminal is transposed: figures as rows, SAEs as columns. If that is
    too wide as well, the lines are longer than the terminal.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=None if sys.stdout.isatty() else width)
    if not table.show_header:  # running text, which may wrap
        console.print(table)
        return
    unlimited = console.options.update(max_width=10_000)

    def full_width(one: RichTable) -> int:
        return Measurement.get(console, unlimited, one).maximum

    if full_width(table) > console.width and full_width(turned := _transpose(table)) <= console.width:
        table = turned
    Console(width=max(console.width, full_width(table))).print(table)


def _transpose(table: RichTable) -> RichTable:
    """Return the table with columns as rows; the first column becomes the header."""
    from rich.table import Table as RichTable

    first, *others = table.columns
    turned = RichTable(box=None, caption=table.caption)
    for heading in (first.header, *first.cells):
        turned.add_column(heading)
    for column in others:
        turned.add_row(column.header, *column.cells)
    return turned


def say(line: str) -> None:
    """Print a line on stderr, for the user."""
    print(line, file=sys.stderr)


def what_now(*commands: str) -> None:
    """Print the next commands to run on stderr."""
    say("What now? " + "; ".join(commands))
