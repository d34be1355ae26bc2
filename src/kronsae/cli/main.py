"""The command line: every verb has a module of its own here; this one puts them together."""

from __future__ import annotations

import sys

import typer

from kronsae.cli import harvest, lists, quickstart, report, sweep, train
from kronsae.cli.eval import app as eval_app
from kronsae.support.errors import UserError
from kronsae.support.terminal import run_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Sparse autoencoders with Kronecker-factorised encoders: train, compare, look inside. "
    "Begin with `kronsae quickstart`.",
)

app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(sweep.sweep)
app.add_typer(eval_app, name="eval")
app.command()(report.report)
app.command()(harvest.harvest)
app.command("recipes")(lists.list_recipes)
app.command("architectures")(lists.list_architectures)

SEPARATE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For a verb whose module is imported only when it is asked for: the module reads the arguments itself."""


@app.command(
    "steer",
    context_settings=SEPARATE,
    add_help_option=False,
    help="Let a run's language model write with some latents changed, beside what it writes without.",
)
def steer(context: typer.Context) -> None:
    """Hand over to the verb's own module, which is imported only here."""
    from kronsae.cli.steer import app as steering

    run_app(steering, "kronsae steer", context.args)


@app.command(
    "bench",
    context_settings=SEPARATE,
    add_help_option=False,
    help="Measure a training step against other libraries, over sizes, and its memory: `kronsae bench --help`.",
)
def bench(context: typer.Context) -> None:
    """Hand over to the benchmarks' own verbs, which are imported only here."""
    from kronsae.cli.bench import app as benchmarks

    run_app(benchmarks, "kronsae bench", context.args)


def main() -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2, never a traceback."""
    try:
        run_app(app, "kronsae")
    except UserError as error:
        label = "Error: " if error.exit_status == UserError.exit_status else ""
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
