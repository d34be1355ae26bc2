"""``kronsae push``: upload SAEs of a run to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kronsae.support.resources import format_bytes
from kronsae.support.terminal import Json, RunArgument, print_json, say, what_now


def push(
    run_folder: RunArgument,
    repository: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository on the Hub; made if need be.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE]...", help="Names of SAEs of the run; none: all of them.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; made if need be.")] = None,
    license: Annotated[
        str, typer.Option(help="Licence of the weights, as the Hub names it: apache-2.0, mit, cc-by-4.0, ...")
    ] = "apache-2.0",
    formats: Annotated[
        list[str] | None,
        typer.Option("--with", help="Also upload folders that another library reads: saelens. Doubles the size."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the files and the model card; upload nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload SAEs of a run to the Hugging Face Hub, with a model card written from the run.

    `ks.load("user/repo")` loads them. Log in first: `hf auth login`.
    """
    from kronsae.publishing.push import push_run
    from kronsae.runs.run import open_run

    pushed = push_run(
        open_run(run_folder),
        repository,
        names or (),
        private=private,
        revision=revision,
        license=license,
        formats=formats or (),
        dry_run=dry_run,
    )
    if as_json:
        result = {"repository": repository, "commit": pushed.commit, "url": pushed.url, "files": dict(pushed.files)}
        print_json(result | ({"card": pushed.card} if dry_run else {}))
    elif dry_run:
        print(pushed.card)
    else:
        print(pushed.url)
    for path, size in pushed.files.items():
        say(f"{path}: {format_bytes(size)}")
    say(f"Licence of the weights: {license}.")
    if dry_run:
        say("Nothing was uploaded.")
        words = ["kronsae", "push", str(run_folder), repository, *(names or ()), "--license", license]
        words += ["--private"] * private + (["--revision", revision] if revision else [])
        what_now(shlex.join([*words, *(word for one in formats or () for word in ("--with", one))]))
    else:
        chosen = f', revision="{revision}"' if revision else ""
        what_now(f'ks.load("{repository}", NAME{chosen}) in Python')
