"""``kronsae import``: SAEs that were trained elsewhere, as a run folder."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kronsae.cli.options import Hook, Model, Out, Text
from kronsae.support.terminal import Json, print_json, say, what_now


def import_saes(
    sae: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...", help="Folder of an SAE in any known format, or user/repo[/folder] on the Hub."
        ),
    ],
    out: Out,
    model: Model = None,
    text: Text = None,
    hook: Hook = None,
    write: Annotated[
        str | None, typer.Option(help="Hook that a transcoder writes, such as layers.3.mlp; default: as its files say.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name in the run, once per SAE; default: of its folder.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the run's config, repeatable: --set context_length=128."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run folder of SAEs that were trained elsewhere, so that everything that works on a run works on them.

    They are converted exactly into the format of this library. --model and --hook default to what their files state.
    """
    from kronsae.runs.imported import Place
    from kronsae.runs.imported import import_saes as write_run

    place = Place(model=model, text=text, hook=hook, write=write)
    run = write_run(sae, out, place, names=name or (), options=option or (), say=say)
    if as_json:
        print_json({"out": str(run.folder), "saes": run.imported})
    else:
        print(run)
    folder = shlex.quote(str(run.folder))
    what_now(f"kronsae eval {folder}", f"kronsae report {folder}")
