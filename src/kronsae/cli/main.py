"""Entry point of the command line; registers the commands, each of which has its own module."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

from kronsae.cli import export, harvest, import_, lists, push, quickstart, report, reproduce, sweep, train
from kronsae.cli.eval import app as eval_app
from kronsae.cli.models import app as models_app
from kronsae.cli.texts import app as texts_app
from kronsae.distributed.launch import check_command, launched, speaks
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


def _print_version(asked: bool) -> None:
    if asked:
        print(version("kronsae"))
        raise typer.Exit


@app.callback()
def main_options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(sweep.sweep)
app.command()(reproduce.reproduce)
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


def _add_separate(name: str, help: str) -> None:
    """Add a command with the app of its own module, imported only when it is called, which parses the arguments."""

    @app.command(
        name,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,
        help=help,
    )
    def call(context: typer.Context) -> None:
        run_app(import_module(f"kronsae.cli.{name}").app, f"kronsae {name}", context.args)


_add_separate("steer", "Generate text with a run's language model, without and with changed latents.")
_add_separate("saebench", "Evaluate SAEs with SAEBench, in an environment of its own.")
_add_separate("plan", "Predict memory, speed, disk space, time and cost of a training on given devices.")
_add_separate("doctor", "Check this installation: kill tiny runs at random moments, damage their files.")
_add_separate("bench", "Measure the speed and memory of a training step, and compare it with other libraries.")


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM interrupt the block as Ctrl-C does.

    Not under ``torchrun``, whose processes may wait for one that is gone, where Python handles no signal: there SIGTERM
    ends a process at once, except in a training, which handles it itself.
    """

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    if launched() or before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run the command line; a `UserError` becomes an error message and exit status 2, without a traceback.

    SIGTERM ends a command as Ctrl-C does.
    """
    try:
        with _sigterm_like_ctrl_c():
            check_command(sys.argv[1:])
            run_app(app, "kronsae")
    except UserError as error:
        if speaks():
            label = "Error: " if error.exit_status == UserError.exit_status else ""
            print(f"{label}{error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
