"""Options and functions that several commands share."""

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
    str | None,
    typer.Option(
        help="Hugging Face model: Hub name, local folder, GGUF file, or a name of `kronsae models`, such as 'bundled'."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text: Hub data set, local .txt, .jsonl or .parquet file, or folder; 'bundled' is Python's own library."
    ),
]
Hook = Annotated[
    str | None,
    typer.Option(help="Hook to read: module path or layer, such as layers.6; with --activations, a harvested hook."),
]
Tokens = Annotated[int | None, typer.Option(help="Number of tokens to train on, or to evaluate on.")]
Flops = Annotated[
    float | None, typer.Option(help="Training budget of each SAE in FLOPs, such as 1e15; instead of --tokens.")
]
SameFlopsAs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The SAE with this name trains on --tokens; every other SAE gets the same FLOPs.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the weights and of the order of the data.")]


def evaluate_with_progress(run: Run, tokens: int | None, quiet: bool) -> list[dict[str, Any]]:
    """Evaluate a run with a progress bar and return the rows of its table."""
    from kronsae.runs.evaluation import evaluate_run
    from kronsae.support.progress import progress_bar

    with progress_bar("evaluating", quiet=quiet) as progress:
        return evaluate_run(run, tokens=tokens, say=say, progress=progress)


def evaluate_pursuit_with_progress(run: Run, spec: str, tokens: int | None, quiet: bool) -> list[dict[str, Any]]:
    from kronsae.runs.evaluation import evaluate_pursuit
    from kronsae.runs.parsing import parse_pursuit
    from kronsae.support.progress import progress_bar

    pursuit = parse_pursuit(spec)
    with progress_bar("evaluating", quiet=quiet) as progress:
        return evaluate_pursuit(run, pursuit, tokens=tokens, say=say, progress=progress)


def evaluate_and_report(run: Run, as_json: bool, quiet: bool, pursuit: str | None = None) -> None:
    """Evaluate a run, also with a pursuit if one is given, write its report and print its table."""
    from kronsae.runs.evaluation import write_report

    if pursuit is None:
        rows = evaluate_with_progress(run, None, quiet)
    else:
        rows = evaluate_pursuit_with_progress(run, pursuit, None, quiet)
    path = write_report(run)
    show_rows(rows, as_json)
    say(f"Report: {path}")


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows of a run's table, as a table or as JSON."""
    from kronsae.runs.evaluation import as_table

    if as_json:
        print_json({"saes": rows})
    else:
        print_table(as_table(rows))


def one_folder(argument: Path | None, out: Path | None) -> Path:
    """Return the run folder, given as an argument or as ``--out``.

    Raises:
        UserError: neither or both are given.
    """
    if (argument is None) == (out is None):
        raise UserError(
            f"the run folder must be given once, as RUN or as --out RUN; got {'none' if out is None else 'both'}."
        )
    folder = argument if argument is not None else out
    assert folder is not None
    return folder
