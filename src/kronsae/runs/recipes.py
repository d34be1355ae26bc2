"""Recipes: functions that return complete run configs.

`RECIPES` maps the names accepted by ``kronsae train --recipe`` to them. `kronsae.runs.architectures` has the functions
for SAEs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kronsae.core.checks import check_count
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs.architectures import SAE_KINDS, kron, topk
from kronsae.runs.config import RunConfig
from kronsae.training.config import LoopConfig

__all__ = ["QUICKSTARTS", "RECIPES", "SAE_KINDS", "describe", "kron", "quickstart", "shortened", "tiny", "topk"]


def short_run_lr(d_sae: int) -> float:
    """Return ``0.7 / sqrt(d_sae)``, a peak learning rate for trainings of hundreds of steps, dense or Kronecker.

    It is fitted to the best rates at 512, 2,048 and 4,096 latents (docs/research-log.md). Long trainings need lower
    rates; elsewhere, the default is the paper's 8e-4.
    """
    return 0.7 / math.sqrt(d_sae)


SMOLLM2_LR = 6e-3
"""Peak learning rate of short trainings on SmolLM2's residual stream with 4,096 latents. Of 0.002, 0.004 and 0.008, the
last two are best for TopK and KronSAE; at `short_run_lr`, 0.011, the loss has spikes."""


def quickstart() -> RunConfig:
    """TopK and KronSAE on the bundled language model: minutes on two cores."""
    short: dict[str, Any] = {"k": 32, "lr": short_run_lr(4096), "dead_after_tokens": 150_000}
    return RunConfig(
        model=ModelConfig(name="bundled"),
        text=TextConfig(source="bundled"),
        hook="layers.3",
        saes=(
            topk(d_sae=4096, **short),
            kron(num_heads=512, d_base=2, d_extension=4, **short),
        ),
        loop=LoopConfig(tokens=600_000, batch_tokens=2048, log_every=5, checkpoint_every=100),
        buffer_tokens=2**17,
        eval_tokens=65_536,
    )


def quickstart_smollm2() -> RunConfig:
    """TopK and KronSAE on SmolLM2-135M-Instruct (see `kronsae models`), layer 15, WikiText-2."""
    short: dict[str, Any] = {"k": 64, "lr": SMOLLM2_LR, "dead_after_tokens": 150_000}
    return RunConfig(
        model=ModelConfig(name="smollm2"),
        text=TextConfig(source="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
        hook="layers.15",
        saes=(
            topk(d_sae=4096, **short),
            kron(num_heads=512, d_base=2, d_extension=4, **short),
        ),
        loop=LoopConfig(tokens=600_000, batch_tokens=2048, log_every=5, checkpoint_every=100),
        context_length=128,
        model_batch=8,  # logits of 1,024 tokens take 0.2 GB, several times over in the evaluation
        buffer_tokens=2**16,
        eval_tokens=16_384,
        eval_ce_tokens=8192,  # a token costs ten times what it costs a training
    )


QUICKSTARTS: dict[str, Callable[[], RunConfig]] = {"bundled": quickstart, "smollm2": quickstart_smollm2}
"""What ``kronsae quickstart --model NAME`` runs, by the model's name."""


def shortened(config: RunConfig, tokens: int) -> RunConfig:
    """Return ``config`` with a budget of ``tokens`` tokens, and batch and evaluation of at most as many.

    The shuffle buffer is limited to a quarter of ``tokens``, and the window pool to four times ``tokens``: tokens that
    remain in them at the end are not trained on, and would take most of the time of a short run.
    """
    check_count("tokens", tokens)
    batch = min(config.loop.batch_tokens, tokens)
    return replace(
        config,
        loop=replace(config.loop, tokens=tokens, batch_tokens=batch),
        window_pool_tokens=min(config.pool_tokens, max(4 * tokens, config.model_batch * config.context_length)),
        buffer_tokens=max(batch, min(config.buffer_tokens, tokens // 4)),
        eval_tokens=min(config.eval_tokens, tokens),
    )


def tiny() -> RunConfig:
    """A small KronSAE on the bundled language model, within a minute, for tests and demonstrations."""
    return RunConfig(
        model=ModelConfig(name="bundled"),
        text=TextConfig(source="bundled"),
        hook="layers.3",
        saes=(kron(num_heads=128, d_base=2, d_extension=4, k=16, dead_after_tokens=50_000),),
        loop=LoopConfig(tokens=131_072, batch_tokens=1024, log_every=4, checkpoint_every=50),
        buffer_tokens=2**15,
        eval_tokens=8192,
    )


def _paper(model: str, hook: str) -> Callable[[], RunConfig]:
    def recipe() -> RunConfig:
        return RunConfig(
            model=ModelConfig(name=model, dtype="bfloat16"),
            text=TextConfig(source="HuggingFaceFW/fineweb-edu", subset="sample-10BT"),
            hook=hook,
            saes=(
                topk(d_sae=2**15, k=50, normalize_activations="none"),
                kron(num_heads=4096, d_base=2, d_extension=4, k=50, normalize_activations="none"),
            ),
            loop=LoopConfig(tokens=125_000_000, batch_tokens=8192),
            context_length=1024,
            buffer_tokens=2**19,
            eval_tokens=1_000_000,
        )

    recipe.__doc__ = f"The paper's TopK and KronSAE (M=2, N=4) on {model}, {hook}, 125M tokens of FineWeb-Edu."
    return recipe


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "quickstart": quickstart,
    "quickstart-smollm2": quickstart_smollm2,
    "tiny": tiny,
    "paper-qwen2.5-1.5b": _paper("Qwen/Qwen2.5-1.5B", "layers.14"),
    "paper-pythia-1.4b": _paper("EleutherAI/pythia-1.4b", "layers.14"),
    "paper-gemma-2-2b": _paper("google/gemma-2-2b", "layers.12"),
}


def describe(recipe: Callable[[], Any]) -> str:
    """Return the first line of a recipe's docstring."""
    return (recipe.__doc__ or "").strip().splitlines()[0]
