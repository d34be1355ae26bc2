"""``kronsae steer``: generate text with changed latents."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kronsae.data.tokens import special_frame
from kronsae.eval.display import visible_lines
from kronsae.interventions.intervene import Intervention, check_latents
from kronsae.interventions.steering import (
    STRENGTH,
    Continuation,
    changes_of,
    continuations,
    hook_of,
    mean_activation_norm,
)
from kronsae.runs.pipeline import Source
from kronsae.runs.run import open_run
from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
"""Width of the table, in columns, if the output is not a terminal."""

app = typer.Typer(add_completion=False)


@app.command()
def command(
    run_folder: RunArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to continue, repeatable.")],
    sae: Annotated[str | None, typer.Option(help="Name of the SAE; optional if the run has only one.")] = None,
    latent: Annotated[list[int] | None, typer.Option(help="Index of a latent to steer with, repeatable.")] = None,
    amount: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            help="Multiple of the latent's direction to add; given once, or once per --latent. Default: by --strength.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Norm to add for every --latent, as a share of the activations' mean norm on held-out text "
            f"(default: {STRENGTH}). At 0.1 little changes; at 1 the text becomes incoherent. Negative: steer away."
        ),
    ] = None,
    ablated: Annotated[list[int] | None, typer.Option("--ablate", help="Latent to set to 0, repeatable.")] = None,
    clamped: Annotated[
        list[str] | None, typer.Option("--clamp", help="LATENT=VALUE: set a latent to a value, repeatable.")
    ] = None,
    multiplied: Annotated[
        list[str] | None, typer.Option("--multiply", help="LATENT=FACTOR: multiply a latent, repeatable.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 40,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy decoding.")] = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Generate text with a run's language model, without and with changed latents.

    Unless --scale is given, the amount to add is derived from the norm of activations on held-out text.
    """
    run = open_run(run_folder)
    run.require_finished()
    name = sae if sae is not None or len(run.names) > 1 else run.names[0]
    if name is None:
        raise UserError(f"--sae must name one of the run's SAEs, {', '.join(run.names)}; got none.")
    if amount and strength is not None:
        raise UserError("--scale and --strength must not be given together; got both. Leave one out.")
    loaded, hook, source = run.load(name), hook_of(run, name), Source(run.config)
    latents, amounts = latent or [], amount or []
    if strength is not None and not latents:
        raise UserError("--strength must be used with --latent; got no --latent.")
    if latents and not amounts:
        check_latents(latents, loaded.d_sae)
        share = STRENGTH if strength is None else strength
        norm = mean_activation_norm(source, hook)
        amounts = [share * norm / float(loaded.W_dec[one].detach().norm()) for one in latents]
        say(f"Steering adds {share:g} times the mean norm of the activations, {norm:.3g} on held-out text.")
    changes = changes_of(latents, amounts, ablated or [], clamped or [], multiplied or [])
    language_model = source.language_model
    first = len(special_frame(language_model.tokenizer)[0])  # SAEs are not trained on special tokens
    intervention = Intervention(
        sae=loaded.to(language_model.device).eval(),
        hook=hook,
        changes=changes,
        positions=slice(first, None),
    )
    found = continuations(
        language_model, prompt, intervention, new_tokens=new_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        settings = {"sae": name, "hook": hook, "changes": [asdict(change) for change in changes]}
        print_json(settings | {"seed": seed, "continuations": [asdict(one) for one in found]})
    else:
        print_table(_as_table(found), width=WIDTH)
        for change in changes:
            say(f"Latent {change.latent} of {name} at {hook}: {change.kind} {change.value:g}")
    what_now(f"kronsae eval latents {shlex.quote(str(run_folder))} --latent {changes[0].latent}")


def _as_table(found: Sequence[Continuation]) -> Table:
    """Return the texts as a table with one text per row, which fits a narrow terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for number, one in enumerate(found):
        if number:
            table.add_row()
        for label, text in (("prompt", one.prompt), ("plain", one.plain), ("changed", one.changed)):
            table.add_row(label, Text(visible_lines(text)))
    return table
