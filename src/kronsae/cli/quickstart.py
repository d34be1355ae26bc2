"""``kronsae quickstart``: train, compare and report on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kronsae.cli.options import OptionalOut, Seed, evaluate_and_report
from kronsae.support.errors import UserError, nearest
from kronsae.support.terminal import Json, Quiet, say, what_now

if TYPE_CHECKING:
    from kronsae.runs.config import RunConfig

PURSUIT = "rounds=2 candidates=2"
"""With which the table has the SAEs again: nothing is trained for it, and it reconstructs better."""


def quickstart(
    out: OptionalOut = None,
    model: Annotated[
        str, typer.Option(help="'bundled', minutes on two cores; or 'smollm2', about 90 MB to fetch.")
    ] = "bundled",
    text: Annotated[
        str | None,
        typer.Option(help="Text in place of the model's own (smollm2: WikiText-2 from the Hub): Hub data set or file."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; also limits the shuffle buffer and the evaluation.")
    ] = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a TopK SAE and a KronSAE on a small language model, compare them and write a report.

    The table has each SAE twice: with its own codes, and encoded with a pursuit, which chooses among more candidates.
    Takes minutes on two cores with the bundled model. The same command resumes an interrupted run. The run folder is
    runs/quickstart, or runs/quickstart-smollm2.
    """
    from kronsae.runs import recipes
    from kronsae.runs.config import with_overrides
    from kronsae.runs.run import Run, execute

    if model not in recipes.QUICKSTARTS:
        raise UserError(
            f"--model must be one of {', '.join(recipes.QUICKSTARTS)} for quickstart; got '{model}'."
            f"{nearest(model, recipes.QUICKSTARTS)} Any other model goes with `kronsae train`."
        )
    config = with_overrides(recipes.QUICKSTARTS[model](), text=text, seed=seed)
    if tokens is not None:
        config = recipes.shortened(config, tokens)
    if out is None:
        out = Path("runs/quickstart" if model == "bundled" else f"runs/quickstart-{model}")
    if text is None and not Run(out).finished:
        _check_text(config)  # before a model is fetched
    run = execute(config, out, show_progress=not quiet, say=say)
    evaluate_and_report(run, as_json, quiet, PURSUIT)
    what_now(f"open {run.folder / 'report.html'} in a browser", "kronsae train --help, to train on your own model")


def _check_text(config: RunConfig) -> None:
    """Raise if the recipe's own text, which may be on the Hub, cannot be read."""
    from kronsae.data.text import TextStream

    try:
        next(iter(TextStream(config.text, held_out_share=config.held_out_share)))
    except UserError as error:
        raise UserError(f"{error} Or give your own text: --text FILE, a .txt, .jsonl or .parquet file.") from None
