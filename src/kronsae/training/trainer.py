"""Training loop: one stream of activations, any number of SAEs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kronsae.core.shares import shares
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member
from kronsae.training.sinks import Sink
from kronsae.training.state import Progress, save_state

Stream = Iterable[tuple[Mapping[str, Tensor], dict[str, Any]]]


def fit(
    members: Sequence[Member],
    stream: Stream,
    config: LoopConfig,
    sinks: Sequence[Sink] = (),
    checkpoints: Path | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    save: Callable[[Path, Sequence[Member], Progress], None] = save_state,
) -> Progress:
    """Train every member on the same batches for its ``steps``, or until ``should_stop``; return the progress.

    The loop ends with the longest training; a member that has finished its steps no longer changes.

    Args:
        members: the SAEs; each takes its own hooks of a batch.
        stream: yields ``({hook: activations [B, d_in]}, state)``, starting after ``progress``.
        config: batch size, and how often to log and to save.
        sinks: receive metrics every ``log_every`` steps and at each member's last step.
        checkpoints: folder for checkpoints; None: no checkpoints.
        progress: progress to resume from; None: start at the beginning.
        should_stop: called before the first and after each step; if True, a checkpoint is written and the loop ends.
        save: writes a checkpoint into the folder.

    Returns:
        The progress at the end.

    Raises:
        UserError: the stream ended too early, or (`Diverged`) a member's numbers are no longer finite.
    """
    progress = Progress() if progress is None else progress
    started = perf_counter() - progress.seconds
    batches = iter(stream)
    hooks = list(dict.fromkeys(hook for member in members for hook in member.hooks))
    steps = max(member.steps for member in members)
    stopping = should_stop()
    while progress.step < steps and not stopping:
        batch, stream_state = next(batches, (None, None))
        if batch is None or stream_state is None:
            raise UserError(
                f"the stream must hold {steps * config.batch_tokens} tokens; it ended after {progress.tokens}. "
                "Train on fewer tokens or give more text."
            )
        step = progress.step
        for hook in hooks:
            check_batch(batch, hook, config.batch_tokens, step)
        logging = (step + 1) % config.log_every == 0
        metrics = {
            member.name: member.step_on(batch, step, logging or step + 1 == member.steps)
            for member in members
            if step < member.steps
        }
        tokens = progress.tokens + config.batch_tokens
        progress = Progress(step + 1, tokens, perf_counter() - started, stream_state)
        for name, of_step in metrics.items():
            if of_step is not None:
                at = {"step": progress.step, "tokens": tokens, "seconds": progress.seconds, "sae": name}
                for sink in sinks:
                    sink.write(at | {key: _json_number(value) for key, value in asdict(of_step).items()})
        stopping = should_stop()  # called once: with two calls the loop could end without a checkpoint
        due = progress.step == steps or stopping or progress.step % config.checkpoint_every == 0
        if due:
            for member in members:  # a checkpoint or a finished SAE never holds NaN
                member.check_weights(progress.step)
        if checkpoints is not None and due:
            for sink in sinks:
                sink.flush()
            save(checkpoints, members, progress)
    return progress


def _json_number(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON lacks: an undefined value is null."""
    return value if value is not None and math.isfinite(value) else None


def check_batch(batch: Mapping[str, Tensor], hook: str, batch_tokens: int, step: int) -> None:
    """Raise if a batch lacks the hook, has another length, or holds values that are not finite."""
    if hook not in batch:
        raise UserError(f"the stream must give activations of hook '{hook}'; got {', '.join(batch)}.")
    rows = int(shares().sum(torch.tensor(len(batch[hook]))))
    if rows != batch_tokens:
        raise UserError(
            f"batches must hold batch_tokens={batch_tokens} tokens; got {rows} at step {step}. Make them equal."
        )
    finite_B = batch[hook].isfinite().all(-1)
    if not bool(finite_B.all()):
        row = int((~finite_B).nonzero()[0, 0])
        raise UserError(
            f"activations must be finite; hook '{hook}' gave NaN or infinity at step {step}, row {row} of the batch. "
            "Check their source."
        )
