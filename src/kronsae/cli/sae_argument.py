"""Commands that measure a run, called with a single SAE: the options that say where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kronsae.support.errors import UserError
from kronsae.support.terminal import say

SaeModel = Annotated[
    str | None, typer.Option("--model", help="For an SAE in place of RUN: its language model, unless its files say.")
]
SaeText = Annotated[str | None, typer.Option("--text", help="For an SAE in place of RUN: text to measure it on.")]
SaeHook = Annotated[
    str | None, typer.Option("--hook", help="For an SAE in place of RUN: the hook it reads, unless its files say.")
]
SaeWrite = Annotated[
    str | None, typer.Option("--write", help="For a transcoder in place of RUN: the hook it writes, likewise.")
]

_app = typer.Typer(add_completion=False)


@_app.command()
def _options(model: SaeModel = None, text: SaeText = None, hook: SaeHook = None, write: SaeWrite = None) -> None:
    """Declare the options; `takes_an_sae` adds them to other commands."""


def run_of(
    argument: Path | None,
    model: str | None = None,
    text: str | None = None,
    hook: str | None = None,
    write: str | None = None,
) -> Path | None:
    """Return the run folder of a command's argument: itself, or the run that an SAE is imported into.

    Raises:
        UserError: the options do not fit the argument, or the SAE cannot be imported.
    """
    from kronsae.runs.imported import Place, run_or_sae

    place = Place(model=model, text=text, hook=hook, write=write)
    if argument is not None:
        return run_or_sae(argument, place, say=say)
    if place.given:
        raise UserError(f"{', '.join(place.given)} must be given with an SAE: its folder, or user/repo; got none.")
    return None


def takes_an_sae(command: Any) -> Any:
    """Return a command with the options of `run_of`; its ``run_folder`` becomes the run of the SAE.

    Args:
        command: a Click command (or one of the copy of Click in newer releases of Typer) with a parameter
            ``run_folder``.
    """
    added = typer.main.get_command(_app).params
    if {option.name for option in added} <= {param.name for param in command.params}:
        return command  # Typer keeps its commands: it was changed before
    command.params = [*command.params, *added]
    call = command.callback

    def callback(**values: Any) -> Any:
        given = {str(option.name): values.pop(str(option.name)) for option in added}
        folder = values["run_folder"]
        return call(**values | {"run_folder": run_of(None if folder is None else Path(folder), **given)})

    command.callback = callback
    return command
