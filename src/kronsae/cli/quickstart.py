"""``kronsae quickstart``: train, compare and report on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kronsae.cli.options import Out, Seed, evaluate_and_report
from kronsae.support.terminal import Json, Quiet, say, what_now


def quickstart(
    out: Out = Path("runs/quickstart"),
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; also limits the shuffle buffer and the evaluation.")
    ] = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a TopK SAE and a KronSAE on the bundled language model, compare them and write a report.

    Takes minutes on two cores. The same command resumes an interrupted run.
    """
    from kronsae.runs import recipes
    from kronsae.runs.config import with_overrides
    from kronsae.runs.run import execute

    config = with_overrides(recipes.quickstart(), seed=seed)
    if tokens is not None:
        config = recipes.shortened(config, tokens)
    run = execute(config, out, show_progress=not quiet, say=say)
    evaluate_and_report(run, as_json, quiet)
    what_now(f"open {run.folder / 'report.html'} in a browser", "kronsae train --help, to train on your own model")
