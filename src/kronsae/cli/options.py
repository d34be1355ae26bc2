"""Options that several verbs share, and what they do with a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronsae.support.errors import UserError
from kronsae.support.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from kronsae.runs.run import Run

Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder.")]
RunFolder = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder (the same as --out).")]
OptionalOut = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder.")]
Model = Annotated[
    str | None, typer.Option(help="Hugging Face model: Hub name or local folder; 'bundled' is the one inside.")
]
Text = Annotated[
    str | None,
    typer.Option(help="Text: Hub data set, local .txt/.jsonl/.parquet or folder; 'bundled' is Python's own library."),
]
Hook = Annotated[
    str | None,
    typer.Option(help="Where to read: module path or layer, such as layers.6; with --activations, one of theirs."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens to use.")]
Flops = Annotated[
    float | None, typer.Option(help="Instead of --tokens: what the training of each SAE may cost, such as 1e15.")
]
SameFlopsAs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The SAE of this name trains on --tokens, each other one on as many as cost the same FLOPs.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")]


def evaluate_with_progress(run: Run, tokens: int | None, quiet: bool) -> list[dict[str, Any]]:
    from kronsae.runs.evaluation import evaluate_run
    from kronsae.support.progress import progress_bar

    with progress_bar("evaluating", quiet=quiet) as progress:
        return evaluate_run(run, tokens=tokens, say=say, progress=progress)


def evaluate_and_report(run: Run, as_json: bool, quiet: bool) -> None:
    from kronsae.runs.evaluation import write_report

    rows = evaluate_with_progress(run, None, quiet)
    path = write_report(run)
    show_rows(rows, as_json)
    say(f"Report: {path}")


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    from kronsae.runs.evaluation import as_table

    if as_json:
        print_json({"saes": rows})
    else:
        print_table(as_table(rows))


def one_folder(argument: Path | None, out: Path | None) -> Path:
    if (argument is None) == (out is None):
        raise UserError("give the run folder once: as RUN or as --out RUN.")
    folder = argument if argument is not None else out
    assert folder is not None
    return folder
