"""``kronsae saebench``: evaluate SAEs with SAEBench, in an environment of its own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronsae.interop.saebench_job import EVALUATIONS, check_evaluation
from kronsae.runs.saebench import NEEDED, check_subjects, find_subjects, make_job, ready_environment, run_job
from kronsae.support.errors import UserError
from kronsae.support.files import check_folder_place
from kronsae.support.terminal import Json, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(add_completion=False)


@app.command()
def command(
    source: Annotated[
        str | None, typer.Argument(metavar="SAE_OR_RUN", help="Run folder, SAE folder, or Hub name (user/repo).")
    ] = None,
    evals: Annotated[str, typer.Option(help=f"Evaluations, separated by commas: {', '.join(EVALUATIONS)}.")] = ",".join(
        EVALUATIONS
    ),
    sae: Annotated[list[str] | None, typer.Option(help="Name of an SAE of the run, repeatable; default: all.")] = None,
    model: Annotated[str | None, typer.Option(help="Language model; default: the run's.")] = None,
    hook: Annotated[
        str | None, typer.Option(help="Hook of the SAE: a layer, or TransformerLens' name; default: the run's.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("saebench"),
    words: Annotated[
        int | None,
        typer.Option(help="Absorption on so many words of the vocabulary: quicker, not comparable with other results."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="EVAL.FIELD=VALUE: a field of SAEBench's config of an evaluation, repeatable."),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help=f"Build SAEBench's environment if there is none: {NEEDED}.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device of model and SAEs: auto, cpu, cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 42,
    as_json: Json = False,
) -> None:
    """Evaluate SAEs with SAEBench; the results have its schema.

    SAEBench pins older versions of common packages, so it runs in an environment of its own (--prepare builds it).
    """
    names = tuple(dict.fromkeys(name.strip() for name in evals.split(",") if name.strip()))
    if not names:
        raise UserError(f"evals must name at least one of {', '.join(EVALUATIONS)}; got '{evals}'.")
    for name in names:
        check_evaluation(name)
    if source is None and not prepare:
        raise UserError("SAE_OR_RUN must be given: a run folder, an SAE folder or a Hub name; got none.")
    subjects = None if source is None else find_subjects(source, sae or [], model, hook)
    if subjects is not None:
        check_folder_place(out)
        job = make_job(subjects, names, out, words, settings or [], device, seed)
        check_subjects(subjects, job)
    built = ready_environment(prepare, _confirmed)
    if subjects is None:
        say(f"SAEBench's environment is ready: {built.folder}")
        what_now("kronsae saebench RUN")
        return
    rows = run_job(built, job, subjects)
    if as_json:
        print_json({"results": rows})
    else:
        print_table(as_table(rows))
    for row in rows:
        if row["reason"] is not None:
            say(f"{row['sae']}, {row['eval']}: no result. {row['reason']}")
    if not any(row["file"] for row in rows):
        raise UserError(f"SAEBench gave no result; {rows[0]['reason']}")
    shown = shlex.quote(source or "")
    what_now(f"ls {shlex.quote(str(out / 'eval_results'))}", f"kronsae eval absorption {shown} (ours, seeded)")


def _confirmed(question: str) -> bool:
    return sys.stdin.isatty() and typer.confirm(question, err=True)


def as_table(rows: list[dict[str, Any]]) -> Table:
    """Return the scores, one row per SAE, evaluation and score."""
    from rich.table import Table

    table = Table("SAE", "evaluation", "score", "value", box=None)
    for row in rows:
        for name, value in row["metrics"].items():
            table.add_row(row["sae"], row["eval"], name, f"{value:.4g}")
    return table
