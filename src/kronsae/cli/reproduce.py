"""``kronsae reproduce``: repeat the paper's tables and figures, with a verdict on each claim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.cli.options import Text
from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, Quiet, print_json, say, what_now


def reproduce(
    name: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Studies to run, or 'all'; see --list.")
    ] = None,
    scale: Annotated[str, typer.Option(help="bundled, laptop, gpu or paper.")] = "laptop",
    text: Text = None,
    seeds: Annotated[str, typer.Option(help="Number of seeds (3 means 0, 1 and 2), or the seeds: 4,5.")] = "3",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for trained SAEs.")] = Path("runs/reproduce"),
    results: Annotated[
        Path | None, typer.Option(help="Folder for results and pages. Default: OUT/SCALE/results.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the studies and scales, and run nothing.")] = False,
    pages: Annotated[
        bool, typer.Option("--pages", help="Write the pages in --results again from its result files; run nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Repeat tables and figures of the paper: train, measure, and write a page with the verdict on its claim.

    All studies of a scale share their trained SAEs. The same command resumes an interrupted study.
    """
    from dataclasses import replace

    from kronsae.reproduce import names, study
    from kronsae.reproduce.context import Context
    from kronsae.reproduce.runner import run_study, write_pages
    from kronsae.reproduce.scales import named_scale
    from kronsae.sweeps.grid import seeds as seeds_of

    if show_list:
        _show_list(as_json)
        return
    if pages:
        where = out / scale / "results" if results is None else results
        say(f"{len(write_pages(where))} page(s) written.")
        what_now(f"read {where / 'README.md'}")
        return
    if not name:
        raise UserError("NAME must be given: a study, several, or 'all'. `kronsae reproduce --list` shows them.")
    chosen = list(names()) if "all" in name else name
    for one in chosen:
        study(one)  # before anything runs
    sizes = named_scale(scale)
    folder = out / scale
    if text is not None:
        sizes = replace(sizes, text=text, subset=None)
    context = Context(scale=sizes, folder=folder, seeds=seeds_of(seeds), quiet=quiet, say=say)
    where = folder / "results" if results is None else results
    found = []
    for number, one in enumerate(chosen, 1):
        say(f"Study {one} ({number} of {len(chosen)}), scale {scale}: {sizes.about}.")
        found.append(run_study(one, context, where))
        if not as_json:
            print(found[-1])
    if as_json:
        print_json({"studies": [dict(one.kept) for one in found]})
    what_now(f"read {where / 'README.md'}, the verdicts on all studies so far", "kronsae reproduce --list")


def _show_list(as_json: bool) -> None:
    from kronsae.reproduce import names, study
    from kronsae.reproduce.scales import SCALES

    studies = [study(name) for name in names()]
    if as_json:
        about = [{"name": one.name, "of": one.of, "claim": one.claim} for one in studies]
        print_json({"studies": about, "scales": {name: one.about for name, one in SCALES.items()}})
        return
    for one in studies:
        print(f"{one.name:14} {one.of}: {one.claim}")
    print()
    for name, sizes in SCALES.items():
        print(f"--scale {name:8} {sizes.about}")
    what_now("kronsae reproduce sparsity --scale bundled")
