"""Tiny runs, trained in well under a second on the models of `tests.tiny_models`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.core import checkpoint
from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.runs.config import RunConfig
from kronsae.runs.recipes import kron, topk
from kronsae.runs.run import Run
from kronsae.training.config import LoopConfig

STEPS = 20
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "writes", "each", "sum", "of", "few")
TIMES = ("seconds", "member_seconds")


def texts(number: int = 60) -> list[str]:
    """Return different documents of a few dozen tokens each."""
    return [" ".join(WORDS[(7 * i + i * j) % len(WORDS)] for j in range(20)) + f" {i}." for i in range(number)]


def write_jsonl(path: Path, number: int = 60) -> Path:
    """Write the documents of `texts` to a ``.jsonl`` file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(number)), encoding="utf-8")
    return path


def tiny_config(model: Path, text: Path, **changes: Any) -> RunConfig:
    """Return a config of 20 steps of 64 tokens, a checkpoint every 5, and latents that die and are revived by AuxK.

    The pool holds 8 batches of windows, the buffer 5 batches of activations.
    """
    config = RunConfig(
        model=ModelConfig(name=str(model), device="cpu"),
        text=TextConfig(source=str(text)),
        hook="layers.2",
        saes=(
            topk(d_sae=32, k=4, dead_after_tokens=120),
            kron(num_heads=8, d_base=2, d_extension=2, k=4, dead_after_tokens=120),
        ),
        loop=LoopConfig(tokens=64 * STEPS, batch_tokens=64, log_every=3, checkpoint_every=5),
        context_length=32,
        model_batch=4,
        window_pool_tokens=1024,
        buffer_tokens=320,
        eval_tokens=100,
        held_out_share=0.2,
    )
    return replace(config, **changes)


def weights(run: Run) -> dict[str, Tensor]:
    """Return all weights of all SAEs of a finished run."""
    found = {name: checkpoint.load(run.sae_folder(name)) for name in run.names}
    return {f"{name}.{key}": tensor for name, sae in found.items() for key, tensor in sae.state_dict().items()}


def rows(run: Run) -> list[dict[str, Any]]:
    """Return the metrics without the times, which differ between runs."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in run.metrics()]


def assert_same_run(one: Run, other: Run) -> None:
    """Assert that two runs have bit-identical weights and the same metrics."""
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert rows(one) == rows(other)


def listing(folder: Path) -> list[str]:
    """Return all paths below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
