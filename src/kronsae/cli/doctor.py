"""``kronsae doctor``: checks of this installation, on this machine and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kronsae.doctor.campaign import campaign
from kronsae.doctor.work import KINDS
from kronsae.support.files import write_json
from kronsae.support.progress import progress_bar
from kronsae.support.terminal import Json, Quiet, print_json, say, what_now

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def doctor() -> None:
    """Check this installation, on this machine and disk."""


@app.command()
def crash(
    kills: Annotated[int, typer.Option(help="SIGKILLs in all, at random moments.")] = 50,
    damages: Annotated[int, typer.Option(help="Random bit flips in stored files, and as many truncations.")] = 200,
    kind: Annotated[list[str] | None, typer.Option(help=f"What to kill, repeatable: {', '.join(KINDS)}.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the moments and places.")] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="New folder to work in, on the disk to check. Default: a temporary one.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Kill tiny runs at random moments and damage their files; check that all resume and no damage is overlooked.

    Trainings on the bundled model, on harvested activations and by two processes, sweeps and harvests are killed with
    SIGKILL, resumed by the same command until they end, and compared with uninterrupted ones, value for value. Then
    single bits of shards, manifests, checkpoints and saved SAEs are flipped, and their ends cut off.
    """
    with progress_bar("campaign", quiet=quiet) as progress:
        found = campaign(
            kills=kills,
            damages=damages,
            kinds=tuple(kind or KINDS),
            seed=seed,
            folder=folder,
            say=say,
            progress=progress,
        )
    if results is not None:
        write_json(results, found)
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines(found)))
    if found["failures"]:
        say(f"{len(found['failures'])} failure(s); please report them with this output.")
        raise typer.Exit(1)
    what_now("nothing: what was killed has resumed, and what was damaged was refused")


def lines(found: dict[str, Any]) -> list[str]:
    """Return the results of a campaign as lines."""
    killed = [
        f"{one['about']}: {one['kills']} kills in {one['runs']} run(s), {one['identical']} with the bits of the "
        f"uninterrupted one, largest difference {one['largest_difference']:.3g} (allowed {one['tolerance']:.3g})"
        for one in found["kills"]
    ]
    damaged = [
        f"{one['about']}, {one['how']}: {one['detected']} of {one['damages']} detected" for one in found["damages"]
    ]
    return [*killed, *damaged, *found["failures"]]
