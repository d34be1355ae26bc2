"""Training SAEs on a stream that a measurement makes up: no model, no text, no run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.core.sae import SAE
from kronsae.support.progress import Progress
from kronsae.training.config import LoopConfig, MemberConfig
from kronsae.training.member import Member
from kronsae.training.trainer import Stream, fit


def train_on(
    configs: Sequence[MemberConfig],
    stream: Stream,
    *,
    hook: str,
    d_in: int,
    steps: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> dict[str, SAE]:
    """Train every SAE on the same batches; return them by name, for raw activations, as they would be saved.

    Args:
        configs: the SAEs, with different names.
        stream: yields ``({hook: [batch_tokens, d_in]}, state)``.
        hook: which of the stream's tensors to read.
        d_in: their width.
        steps: optimiser steps.
        batch_tokens: tokens per step.
        progress: told ``(steps done, steps to do)``.
    """
    members = [Member(config, d_in, hook, steps) for config in configs]
    loop = LoopConfig(tokens=steps * batch_tokens, batch_tokens=batch_tokens, log_every=max(1, steps // 20))
    fit(members, stream, loop, [] if progress is None else [_ProgressSink(progress, steps)])
    return {member.name: member.finished_sae().trained().eval().requires_grad_(False) for member in members}


class _ProgressSink:
    """Hands the step number of the trainer's metrics on to a progress bar."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def write(self, row: Mapping[str, Any]) -> None:
        self.progress(row["step"], self.steps)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""
