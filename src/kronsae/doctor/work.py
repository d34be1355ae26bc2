"""The tiny runs of a campaign, and what a process does for one of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kronsae.data.model import ModelConfig
from kronsae.data.text import TextConfig
from kronsae.distributed.launch import team
from kronsae.runs.config import RunConfig
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.recipes import kron, topk
from kronsae.runs.run import execute
from kronsae.support.config import to_dict
from kronsae.support.errors import Interrupted
from kronsae.support.files import write_json
from kronsae.sweeps.grid import SweepConfig
from kronsae.sweeps.sweep import execute_sweep
from kronsae.training.config import LoopConfig

LIVE_STEPS, CACHED_STEPS, SWEEP_STEPS = 48, 300, 90
"""So many that a good part of the time is training."""
BATCH_TOKENS = 128
HARVEST_TOKENS = 2000
SHARD_BYTES = 2**18
DOCUMENTS = 150
RANKS = 2

WORDS = ("the", "run", "was", "killed", "and", "a", "new", "one", "went", "on", "as", "if", "nothing", "was", "lost")


def write_text_file(path: Path) -> None:
    """Write documents of random words, the same ones each time."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=60)) + f" {number}." for number in range(DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")


def config_of(text: Path, activations: Path | None = None) -> RunConfig:
    """Return a run of seconds on the bundled model: two SAEs, latents that die, a checkpoint every third step."""
    config = RunConfig(
        model=ModelConfig(name="bundled", device="cpu"),
        text=TextConfig(source=str(text)),
        hook="layers.1",
        saes=(
            topk(d_sae=64, k=4, dead_after_tokens=500),
            kron(num_heads=16, d_base=2, d_extension=2, k=4, dead_after_tokens=500),
        ),
        loop=LoopConfig(tokens=LIVE_STEPS * BATCH_TOKENS, batch_tokens=BATCH_TOKENS, log_every=2, checkpoint_every=3),
        context_length=32,
        model_batch=4,
        window_pool_tokens=1024,
        buffer_tokens=512,
        eval_tokens=200,
        held_out_share=0.2,
    )
    if activations is None:
        return config
    return with_activations(with_steps(config, CACHED_STEPS), activations)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Return a config with so many steps."""
    return replace(config, loop=replace(config.loop, tokens=steps * BATCH_TOKENS))


def train_live(text: Path, activations: Path, out: Path) -> None:
    """Train on the model."""
    _alone()
    execute(config_of(text), out, show_progress=False, keep_checkpoints=True)


def train_cached(text: Path, activations: Path, out: Path) -> None:
    """Train on harvested activations."""
    _alone()
    execute(config_of(text, activations), out, show_progress=False, keep_checkpoints=True)


def train_together(text: Path, activations: Path, out: Path) -> None:
    """Train with the other processes."""
    _alone()
    with team() as processes:
        execute(config_of(text), out, show_progress=False, keep_checkpoints=True, team=processes)


def sweep(text: Path, activations: Path, out: Path) -> None:
    """Train and evaluate a grid in two groups."""
    _alone()
    base = out.parent / f"{out.name}.json"
    write_json(base, to_dict(with_steps(config_of(text), SWEEP_STEPS)))
    grid = SweepConfig(saes=("topk d_sae=64 k={2,4}",), config=str(base), seeds=(0, 1))
    execute_sweep(grid, out, show_progress=False)


def harvest_activations(text: Path, activations: Path, out: Path) -> None:
    """Harvest activations of the same text."""
    _alone()
    harvest(**_harvest_of(text), out=out)


def harvest_a_part(text: Path, activations: Path, out: Path) -> None:
    """Harvest a shard, and stop."""

    def stop(done: int, total: int) -> None:
        if any(out.glob("progress.json")):
            raise KeyboardInterrupt

    _alone()
    try:
        harvest(**_harvest_of(text), out=out, progress=stop)
    except Interrupted:
        return


def _harvest_of(text: Path) -> dict[str, Any]:
    config = config_of(text)
    return {
        "model": config.model,
        "text": config.text,
        "hook": config.hook,
        "tokens": HARVEST_TOKENS,
        "context_length": config.context_length,
        "model_batch": config.model_batch,
        "window_pool_tokens": config.window_pool_tokens,
        "held_out_share": config.held_out_share,
        "shard_bytes": SHARD_BYTES,
    }


def _alone() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Kind:
    """A kind of work that is killed.

    Args:
        about: what it is, for the table.
        work: what a process does for it: ``work(text, activations, out)``.
        ranks: number of processes.
        tolerance: largest difference of a value from the uninterrupted work; 0: the same bits.
        checkpoint: what to call the checkpoints that it leaves; empty: it leaves none.
    """

    about: str
    work: Callable[[Path, Path, Path], None]
    ranks: int = 1
    tolerance: float = 0.0
    checkpoint: str = ""


KINDS: dict[str, Kind] = {
    "live": Kind("training on the model", train_live, checkpoint="checkpoint"),
    "cached": Kind("training on harvested activations", train_cached, checkpoint="checkpoint, harvested activations"),
    "sweep": Kind("sweep of two groups", sweep),
    "distributed": Kind(
        "training by two processes",
        train_together,
        ranks=RANKS,
        tolerance=1e-5,
        checkpoint="checkpoint of two processes",
    ),
    "harvest": Kind("harvest", harvest_activations),
}
