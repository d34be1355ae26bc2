"""``kronsae export``: write SAEs of a run in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, Quiet, RunArgument, print_json, say, what_now

TOKENS, SPLITS = 1_000_000, 5
"""Tokens and files of a cache of delphi by default."""


def export(
    run_folder: RunArgument,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE]...", help="Names of SAEs of the run; none: all of them.")
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="Format: saelens, sparsify, circuit-tracer, or delphi (a cache of latents).")
    ] = "saelens",
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.")] = ...,  # type: ignore[assignment]
    tokens: Annotated[
        int | None, typer.Option(help=f"Held-out tokens to read for a cache of delphi (default: {TOKENS:,}).")
    ] = None,
    splits: Annotated[int | None, typer.Option(help=f"Files of a cache of delphi (default: {SPLITS}).")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write SAEs of a run in the format of another library.

    A single SAE is written into --out, several into a folder each, unless the format has a layout of its own.
    """
    from kronsae.publishing.export import export_run
    from kronsae.runs.run import open_run

    run = open_run(run_folder)
    if to == "delphi":
        from kronsae.publishing.delphi_cache import export_delphi
        from kronsae.support.progress import progress_bar

        with progress_bar("encoding", quiet=quiet) as progress:
            exported = export_delphi(
                run,
                out,
                names or (),
                tokens=TOKENS if tokens is None else tokens,
                splits=SPLITS if splits is None else splits,
                progress=progress,
            )
    elif tokens is not None or splits is not None:
        raise UserError(f"--tokens and --splits must be used with --to delphi; got --to {to}. Leave them out.")
    else:
        exported = export_run(run, to, out, names or ())
    for remark in exported.remarks:
        say(remark)
    if as_json:
        print_json({name: str(folder) for name, folder in exported.folders.items()})
    else:
        for name, folder in exported.folders.items():
            print(f"{name}: {folder}")
    what_now(*exported.next_steps)
