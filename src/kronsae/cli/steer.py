"""``kronsae steer``."""

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
"""Columns of the texts where nobody looks at a terminal."""

app = typer.Typer(add_completion=False)


@app.command()
def command(
    run_folder: RunArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from, repeatable.")],
    sae: Annotated[str | None, typer.Option(help="Which SAE of the run; may be left out where there is one.")] = None,
    latent: Annotated[list[int] | None, typer.Option(help="A latent to steer by, repeatable.")] = None,
    amount: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            help="Adds this times the latent's direction; for all --latent or one for each. Without: by --strength.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="What every --latent adds, as a share of the activations' mean norm on held-out text "
            f"[default: {STRENGTH}]. At 0.1 little changes, at 1 the text falls apart; below 0 steers away."
        ),
    ] = None,
    ablated: Annotated[list[int] | None, typer.Option("--ablate", help="A latent to take out, repeatable.")] = None,
    clamped: Annotated[
        list[str] | None, typer.Option("--clamp", help="LATENT=VALUE: holds a latent at a value, repeatable.")
    ] = None,
    multiplied: Annotated[
        list[str] | None, typer.Option("--multiply", help="LATENT=FACTOR: multiplies a latent, repeatable.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 40,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time; else drawn.")] = 0.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Let a run's language model go on from a prompt, without and with some latents changed.

    How much is added is measured on held-out text unless --scale says it.
    """
    run = open_run(run_folder)
    run.require_finished()
    name = sae if sae is not None or len(run.names) > 1 else run.names[0]
    if name is None:
        raise UserError(f"--sae must name one of the run's SAEs: {', '.join(run.names)}.")
    if amount and strength is not None:
        raise UserError("give --scale or --strength, not both.")
    loaded, hook, source = run.load(name), hook_of(run, name), Source(run.config)
    latents, amounts = latent or [], amount or []
    if strength is not None and not latents:
        raise UserError("--strength is of --latent; got no --latent.")
    if latents and not amounts:
        check_latents(latents, loaded.d_sae)
        share = STRENGTH if strength is None else strength
        norm = mean_activation_norm(source, hook)
        amounts = [share * norm / float(loaded.W_dec[one].detach().norm()) for one in latents]
        say(f"Steering adds {share:g} of the activations' mean norm, which is {norm:.3g} on held-out text.")
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
        told = {"sae": name, "hook": hook, "changes": [asdict(change) for change in changes]}
        print_json(told | {"seed": seed, "continuations": [asdict(one) for one in found]})
    else:
        print_table(_as_table(found), width=WIDTH)
        for change in changes:
            say(f"Latent {change.latent} of {name} at {hook}: {change.kind} {change.value:g}")
    what_now(f"kronsae eval latents {shlex.quote(str(run_folder))} --latent {changes[0].latent}")


def _as_table(found: Sequence[Continuation]) -> Table:
    """One text below the other, so that it can be read in a narrow terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for number, one in enumerate(found):
        if number:
            table.add_row()
        for label, text in (("prompt", one.prompt), ("plain", one.plain), ("changed", one.changed)):
            table.add_row(label, Text(visible_lines(text)))
    return table
