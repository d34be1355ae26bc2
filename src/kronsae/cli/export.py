"""``kronsae export``: write SAEs of a run in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.support.terminal import Json, RunArgument, print_json, say, what_now


def export(
    run_folder: RunArgument,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE]...", help="Names of SAEs of the run; none: all of them.")
    ] = None,
    to: Annotated[str, typer.Option("--to", help="Format: saelens, sparsify, circuit-tracer.")] = "saelens",
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.")] = ...,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Write SAEs of a run in the format of another library.

    A single SAE is written into --out, several into a folder each, unless the format has a layout of its own.
    """
    from kronsae.publishing.export import export_run
    from kronsae.runs.run import open_run

    exported = export_run(open_run(run_folder), to, out, names or ())
    for remark in exported.remarks:
        say(remark)
    if as_json:
        print_json({name: str(folder) for name, folder in exported.folders.items()})
    else:
        for name, folder in exported.folders.items():
            print(f"{name}: {folder}")
    what_now(*exported.next_steps)
