"""Training of SAEs on the synthetic stream of a measurement, without language model, text or run folder."""

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
    """Train all SAEs on the same batches; return them by name in the form in which they would be saved.

    Args:
        configs: configs of the SAEs, with different names.
        stream: yields ``({hook: [batch_tokens, d_in]}, state)``.
        hook: key of the activations in the stream.
        d_in: width of the activations.
        steps: optimiser steps.
        batch_tokens: tokens per step.
        progress: called with ``(steps done, all steps)``.
    """
    members = [Member(config, d_in, hook, steps) for config in configs]
    loop = LoopConfig(tokens=steps * batch_tokens, batch_tokens=batch_tokens, log_every=max(1, steps // 20))
    fit(members, stream, loop, [] if progress is None else [_ProgressSink(progress, steps)])
    return {member.name: member.finished_sae().trained().eval().requires_grad_(False) for member in members}


class _ProgressSink:
    """Metrics sink that passes the step number to a progress bar."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps

    def write(self, row: Mapping[str, Any]) -> None:
        self.progress(row["step"], self.steps)

    def flush(self) -> None:
        """Do nothing: no output is buffered."""

    def close(self) -> None:
        """Do nothing: no file is open."""
