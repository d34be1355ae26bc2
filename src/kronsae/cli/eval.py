"""``kronsae eval``: the table of a run, and one subcommand per measurement, imported when it is called."""

from __future__ import annotations

import shlex
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kronsae.cli.options import (
    OptionalOut,
    RunFolder,
    Tokens,
    evaluate_pursuit_with_progress,
    evaluate_with_progress,
    one_folder,
    show_rows,
)
from kronsae.cli.sae_argument import takes_an_sae
from kronsae.report.measurements import MEASUREMENTS, module_name
from kronsae.support.errors import UserError, nearest
from kronsae.support.terminal import Json, Quiet, what_now

DEFAULT = "table"


class MeasureGroup(TyperGroup):
    """Command group whose subcommands are `MEASUREMENTS`; `DEFAULT` is called if no subcommand is given.

    Contexts and commands are typed as Any: they are Click's, or those of the copy of Click in newer releases of Typer.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MEASUREMENTS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in MEASUREMENTS:
            app: typer.Typer = import_module(f"kronsae.measures.{module_name(cmd_name)}").app
            command: Any = typer.main.get_command(app)
            command.name = cmd_name
        else:
            command = super().get_command(ctx, cmd_name)
        return None if command is None else takes_an_sae(command)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        verbs = self.list_commands(ctx)
        if not args or (args[0] not in verbs and args[0] not in ctx.help_option_names):
            _refuse_misspelt(args, verbs)
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def _refuse_misspelt(args: list[str], verbs: list[str]) -> None:
    """Raise for a misspelt subcommand, as in ``kronsae eval absorbtion RUN``, which would be read as a run folder."""
    positional = [argument for argument in args if not argument.startswith("-")]
    if len(positional) > 1 and args[:2] == positional[:2]:
        raise UserError(f"the measurement must be one of {', '.join(verbs)}; got '{args[0]}'.{nearest(args[0], verbs)}")


app = typer.Typer(
    cls=MeasureGroup,
    no_args_is_help=True,
    help="Measure a finished run. `kronsae eval RUN` prints the table: explained variance, l0, dead share, CE and KL "
    "recovered on held-out text. The subcommands make further measurements. In place of RUN, all of them take the "
    "folder of a single SAE, also of another library, or user/repo on the Hub, with --model, --text and --hook. "
    "Options of the table: `kronsae eval table --help`.",
)


@app.command(DEFAULT)
def evaluate(
    run_folder: RunFolder = None,
    out: OptionalOut = None,
    tokens: Tokens = None,
    pursuit: Annotated[
        str | None,
        typer.Option(
            help="Also with pursued codes, 'rounds=2 candidates=2' (besides: refit, start); rows side by side."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run's SAEs on held-out text: explained variance, l0, dead share, CE and KL recovered."""
    from kronsae.runs.run import open_run

    run = open_run(one_folder(run_folder, out))
    if pursuit is None:
        rows = evaluate_with_progress(run, tokens, quiet)
    else:
        rows = evaluate_pursuit_with_progress(run, pursuit, tokens, quiet)
    show_rows(rows, as_json)
    what_now(f"kronsae report {shlex.quote(str(run.folder))}")
