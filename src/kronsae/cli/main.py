"""Entry point of the command line; registers the commands, each of which has its own module."""

from __future__ import annotations

import sys

import typer

from kronsae.cli import export, harvest, import_, lists, push, quickstart, report, sweep, train
from kronsae.cli.eval import app as eval_app
from kronsae.cli.models import app as models_app
from kronsae.cli.texts import app as texts_app
from kronsae.support.errors import UserError
from kronsae.support.terminal import run_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train, evaluate and inspect sparse autoencoders with Kronecker-factorised encoders. "
    "Start with `kronsae quickstart`.",
)

app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(sweep.sweep)
app.add_typer(eval_app, name="eval")
app.command()(report.report)
app.command("import")(import_.import_saes)
app.command()(export.export)
app.command()(push.push)
app.command()(harvest.harvest)
app.add_typer(models_app, name="models")
app.add_typer(texts_app, name="texts")
app.command("recipes")(lists.list_recipes)
app.command("architectures")(lists.list_architectures)

SEPARATE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command whose module is imported only when it is called and parses the arguments itself."""


@app.command(
    "steer",
    context_settings=SEPARATE,
    add_help_option=False,
    help="Generate text with a run's language model, without and with changed latents.",
)
def steer(context: typer.Context) -> None:
    """Call the command's own module, which is imported only here."""
    from kronsae.cli.steer import app as steering

    run_app(steering, "kronsae steer", context.args)


@app.command(
    "saebench",
    context_settings=SEPARATE,
    add_help_option=False,
    help="Evaluate SAEs with SAEBench, in an environment of its own.",
)
def saebench(context: typer.Context) -> None:
    """Call the command's own module, which is imported only here."""
    from kronsae.cli.saebench import app as evaluation

    run_app(evaluation, "kronsae saebench", context.args)


@app.command(
    "bench",
    context_settings=SEPARATE,
    add_help_option=False,
    help="Measure the speed and memory of a training step, and compare it with other libraries.",
)
def bench(context: typer.Context) -> None:
    """Call the benchmarks' own module, which is imported only here."""
    from kronsae.cli.bench import app as benchmarks

    run_app(benchmarks, "kronsae bench", context.args)


def main() -> None:
    """Run the command line; a `UserError` becomes an error message and exit status 2, without a traceback."""
    try:
        run_app(app, "kronsae")
    except UserError as error:
        label = "Error: " if error.exit_status == UserError.exit_status else ""
        print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
