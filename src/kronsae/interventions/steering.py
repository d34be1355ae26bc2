"""Text that a model generates with and without changed latents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronsae.core.checks import check_count, check_seed
from kronsae.data.model import LanguageModel
from kronsae.data.tokens import special_frame
from kronsae.interventions.intervene import Change, Intervention, ablate, clamp, intervene, scale, steer
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Run
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Continuations of a prompt: by the unchanged model (``plain``), and with changed latents (``changed``)."""

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
    """Generate a continuation of each prompt without and with the interventions.

    Args:
        language_model: a model from `kronsae.data.model.load_model`.
        prompts: prompts, run as one batch with padding on the left.
        interventions: the interventions.
        new_tokens: maximum number of generated tokens; the model may end the text earlier.
        temperature: 0: greedy decoding. Otherwise tokens are sampled, both times with the same seed.
        seed: seed of the sampling.

    Raises:
        UserError: the model has no language model head, or a prompt is empty or too long.
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
    """Return the model's continuation of each prompt; arguments as for `continuations`."""
    check_count("new_tokens", new_tokens)
    if not temperature >= 0:
        raise UserError(f"temperature must be at least 0; got {temperature!r}.")
    check_seed(seed)
    if language_model.no_lm_head_reason:
        raise UserError(
            f"the model must be able to generate text; '{language_model.name}' cannot: "
            f"{language_model.no_lm_head_reason}."
        )
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
    """Return token ids and attention mask ``[S, T]``, padded on the left, with the first special token of windows."""
    tokenizer: Any = language_model.tokenizer
    prefix, _ = special_frame(tokenizer)
    rows = [prefix + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise UserError(f"prompt must have at least one token; got {prompt!r}.")
    width = max(map(len, rows), default=0)
    ids_ST = torch.tensor([[_padding(language_model)] * (width - len(row)) + row for row in rows])
    mask_ST = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_ST.to(language_model.device), mask_ST.to(language_model.device)


def _padding(language_model: LanguageModel) -> int:
    tokenizer = language_model.tokenizer
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def _generators(device: torch.device) -> list[torch.device]:
    """Return the devices other than the CPU whose random state generation changes."""
    return [device] if device.type == "cuda" else []


NORM_TOKENS = 2048
"""Number of held-out tokens over which the norm of the activations is measured."""

STRENGTH = 0.25
"""Default strength of steering, as a share of the activations' mean norm: most texts change and remain coherent.

`scripts/steering_study.py` measures it (docs/intervention.md). The largest activation of a latent is not a better
scale, because it varies between latents and rare latents have none on a short text.
"""


@torch.no_grad()
def mean_activation_norm(source: Source, hook: str, tokens: int = NORM_TOKENS) -> float:
    """Return ``mean ||x||`` over the activations x of one hook on the first ``tokens`` held-out tokens, or on all."""
    norms: list[Tensor] = []
    for values, _ in source.activations(held_out=True, repeat=False, hook=hook):
        norms.append(values[hook].float().norm(dim=1).cpu())
        if sum(map(len, norms)) >= tokens:
            break
    return float(torch.cat(norms)[:tokens].mean())


def hook_of(run: Run, name: str) -> str:
    """Return the single hook that an SAE of the run reads and reconstructs, which may differ from the run's hook.

    Raises:
        UserError: the SAE is a transcoder or crosscoder.
    """
    member = next(member for member in run.config.saes if member.name == name)
    hook = member.reconstructs(run.config.hook)
    if hook is None:
        read, write = member.reads(run.config.hook), member.writes(run.config.hook)
        raise UserError(
            f"--sae must name an SAE that reconstructs the single hook it reads; '{name}' reads {' + '.join(read)} and "
            f"writes {' + '.join(write)}. Choose another SAE."
        )
    return hook


def changes_of(
    latents: Sequence[int],
    amounts: Sequence[float],
    ablated: Sequence[int],
    clamped: Sequence[str],
    multiplied: Sequence[str],
) -> list[Change]:
    """Return the changes given by the options of ``kronsae steer``.

    Raises:
        UserError: there is no change, or a number is missing.
    """
    if len(amounts) not in (len(latents), min(1, len(latents))):
        raise UserError(
            f"--scale must be given once or once per --latent; got {len(amounts)} for {len(latents)} latent(s)."
        )
    amounts = list(amounts) * len(latents) if len(amounts) == 1 else amounts
    changes = [steer(latent, amount) for latent, amount in zip(latents, amounts, strict=True)]
    changes += [ablate(latent) for latent in ablated]
    changes += [clamp(*_parse_pair("--clamp", text)) for text in clamped]
    changes += [scale(*_parse_pair("--multiply", text)) for text in multiplied]
    if not changes:
        raise UserError(
            "at least one change must be given; got none. Give --latent 123 --scale 5, --ablate 123, --clamp 123=4 or "
            "--multiply 123=0.5."
        )
    return changes


def _parse_pair(option: str, text: str) -> tuple[int, float]:
    latent, _, value = text.partition("=")
    try:
        return int(latent), float(value)
    except ValueError:
        raise UserError(f"{option} must be LATENT=NUMBER, such as 123=4; got '{text}'.") from None
