"""How every verb talks: options that all share, figures on stdout, everything else on stderr, one sentence of error."""

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
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]

USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])
"""What wrong words raise: a class of Click, or of the copy of it that newer releases of Typer bring along."""


def run_app(app: typer.Typer, name: str, words: Sequence[str] | None = None) -> None:
    """Carry out a command line; wrong words raise a `UserError` of one sentence, as everything else that is wrong.

    Args:
        app: the verbs.
        name: what its help calls it.
        words: of the command line; None: the process's own.
    """
    try:
        status = app(words, prog_name=name, standalone_mode=False)
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # nothing was given: then the help is the answer
            cast(Any, error).show()
            sys.exit(2)
        raise UserError(_in_a_sentence(error, name, sys.argv[1:] if words is None else words)) from None
    if isinstance(status, int) and status:
        sys.exit(status)


def _in_a_sentence(error: Any, name: str, words: Sequence[str]) -> str:
    """What is wrong, the nearest option that is known or the value that was given, and where all options are listed."""
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
    """The figures, as JSON on stdout."""
    print(json.dumps(value, indent=2))


def print_table(table: RichTable, width: int = 200) -> None:
    """A rich table on stdout; of about ``width`` columns where nobody looks at a terminal.

    No figure is cut off: a table too wide for the terminal is turned, figures downwards and SAEs across; where that is
    too wide as well, its lines are as long as they are.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=None if sys.stdout.isatty() else width)
    if not table.show_header:  # running text, to be wrapped
        console.print(table)
        return
    everything = console.options.update(max_width=10_000)

    def wide(one: RichTable) -> int:
        return Measurement.get(console, everything, one).maximum

    if wide(table) > console.width and wide(turned := _turned(table)) <= console.width:
        table = turned
    Console(width=max(console.width, wide(table))).print(table)


def _turned(table: RichTable) -> RichTable:
    """Columns as rows; the first column gives the headings."""
    from rich.table import Table as RichTable

    first, *others = table.columns
    turned = RichTable(box=None, caption=table.caption)
    for heading in (first.header, *first.cells):
        turned.add_column(heading)
    for column in others:
        turned.add_row(column.header, *column.cells)
    return turned


def say(line: str) -> None:
    """A line for the person, on stderr."""
    print(line, file=sys.stderr)


def what_now(*commands: str) -> None:
    """What one does next, on stderr."""
    say("What now? " + "; ".join(commands))
