"""What a model writes with some latents changed, beside what it writes without: ``kronsae steer``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from kronsae.core.checks import check_count, check_seed
from kronsae.data.model import LanguageModel
from kronsae.data.tokens import special_frame
from kronsae.eval.display import visible_lines
from kronsae.interventions.intervene import Change, Intervention, ablate, check_latents, clamp, intervene, scale, steer
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Run, open_run
from kronsae.support.errors import UserError
from kronsae.support.terminal import Json, RunArgument, Seed, print_json, print_table, say, what_now

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model writes after a prompt: as it is (``plain``), and with latents changed (``changed``)."""

    prompt: str
    plain: str
    changed: str


def continuations(
    language_model: LanguageModel,
    prompts: Sequence[str],
    *interventions: Intervention,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Continuation]:
    """Let the model go on from each prompt, without and with the interventions.

    Args:
        language_model: as `kronsae.data.model.load_model` gives it.
        prompts: run as one batch, padded on the left.
        interventions: what is changed.
        new_tokens: at most so many; fewer where the model ends the text.
        temperature: 0: the most probable token each time; else tokens are drawn, both times with the same seed.
        seed: of the draw.

    Raises:
        UserError: the model has no head for the next token, or the prompt is empty or too long for it.
    """
    plain = generate(language_model, prompts, new_tokens=new_tokens, temperature=temperature, seed=seed)
    with intervene(language_model.model, *interventions):
        changed = generate(language_model, prompts, new_tokens=new_tokens, temperature=temperature, seed=seed)
    return [
        Continuation(prompt=prompt, plain=one, changed=other)
        for prompt, one, other in zip(prompts, plain, changed, strict=True)
    ]


def generate(
    language_model: LanguageModel,
    prompts: Sequence[str],
    *,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> list[str]:
    """What the model writes after each prompt, seeded; see `continuations`."""
    check_count("new_tokens", new_tokens)
    if not temperature >= 0:
        raise UserError(f"temperature must be at least 0; got {temperature!r}.")
    check_seed(seed)
    if language_model.no_lm_head_reason:
        raise UserError(f"'{language_model.name}' cannot write: {language_model.no_lm_head_reason}.")
    ids_ST, mask_ST = padded_prompts(language_model, prompts)
    language_model.check_context_length(ids_ST.shape[1] + new_tokens)
    drawing: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    model: Any = language_model.model
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(torch.random.fork_rng(_generators(language_model.device)))
        torch.manual_seed(seed)
        written_ST = model.generate(
            input_ids=ids_ST,
            attention_mask=mask_ST,
            max_new_tokens=new_tokens,
            use_cache=use_cache,
            pad_token_id=_padding(language_model),
            **({"do_sample": False} | drawing),
        )
    tokenizer: Any = language_model.tokenizer
    return [tokenizer.decode(row_T, skip_special_tokens=True) for row_T in written_ST[:, ids_ST.shape[1] :]]


def padded_prompts(language_model: LanguageModel, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[S, T]``, padded on the left, with the special token that windows begin with."""
    tokenizer: Any = language_model.tokenizer
    prefix, _ = special_frame(tokenizer)
    rows = [prefix + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise UserError(f"prompt must hold at least one token; got {prompt!r}.")
    width = max(map(len, rows), default=0)
    ids_ST = torch.tensor([[_padding(language_model)] * (width - len(row)) + row for row in rows])
    mask_ST = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_ST.to(language_model.device), mask_ST.to(language_model.device)


def _padding(language_model: LanguageModel) -> int:
    tokenizer = language_model.tokenizer
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def _generators(device: torch.device) -> list[torch.device]:
    """The devices besides the CPU whose random state generation uses up."""
    return [device] if device.type == "cuda" else []


WIDTH = 80
"""Columns of the texts where nobody looks at a terminal."""

NORM_TOKENS = 2048
"""Held-out tokens over which the norm of the activations is measured; about so many."""

STRENGTH = 0.25
"""Of the activations' mean norm, what steering adds if no other amount is asked for: most texts change and stay text.

`scripts/steering_study.py` measures it (docs/intervention.md). The largest activation of a latent is no better a
measure: it differs from latent to latent, and rare ones have none on a short text.
"""


@torch.no_grad()
def mean_activation_norm(source: Source, hook: str, tokens: int = NORM_TOKENS) -> float:
    """``mean ||x||`` of the activations x of one hook over the first held-out tokens, as many as there are of them."""
    norms: list[Tensor] = []
    for values, _ in source.activations(held_out=True, repeat=False, hook=hook):
        norms.append(values[hook].float().norm(dim=1).cpu())
        if sum(map(len, norms)) >= tokens:
            break
    return float(torch.cat(norms)[:tokens].mean())


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


def hook_of(run: Run, name: str) -> str:
    """The one hook that an SAE of the run reads and reconstructs, which need not be the run's own.

    Raises:
        UserError: it reads or writes others besides.
    """
    member = next(member for member in run.config.saes if member.name == name)
    hook = member.reconstructs(run.config.hook)
    if hook is None:
        read, write = member.reads(run.config.hook), member.writes(run.config.hook)
        raise UserError(
            f"--sae must name an SAE that reconstructs the one hook it reads; '{name}' reads {' + '.join(read)} and "
            f"writes {' + '.join(write)}. Choose another SAE, or change the model with kronsae.interventions.intervene."
        )
    return hook


def changes_of(
    latents: Sequence[int],
    amounts: Sequence[float],
    ablated: Sequence[int],
    clamped: Sequence[str],
    multiplied: Sequence[str],
) -> list[Change]:
    """The changes that the options of ``kronsae steer`` describe.

    Raises:
        UserError: there is none, or a number is missing.
    """
    if len(amounts) not in (len(latents), min(1, len(latents))):
        raise UserError(
            f"--scale must be given once, or once for each --latent; got {len(amounts)} for {len(latents)} latent(s)."
        )
    amounts = list(amounts) * len(latents) if len(amounts) == 1 else amounts
    changes = [steer(latent, amount) for latent, amount in zip(latents, amounts, strict=True)]
    changes += [ablate(latent) for latent in ablated]
    changes += [clamp(*_pair("--clamp", words)) for words in clamped]
    changes += [scale(*_pair("--multiply", words)) for words in multiplied]
    if not changes:
        raise UserError("give a change: --latent 123 --scale 5, --ablate 123, --clamp 123=4 or --multiply 123=0.5.")
    return changes


def _pair(option: str, words: str) -> tuple[int, float]:
    latent, _, value = words.partition("=")
    try:
        return int(latent), float(value)
    except ValueError:
        raise UserError(f"{option} takes LATENT=NUMBER, such as 123=4; got '{words}'.") from None


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
