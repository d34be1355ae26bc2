"""Helpers that stop runs during training."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kronsae.runs.config import RunConfig
from kronsae.runs.run import Run, execute
from kronsae.training.member import Member


def go(config: RunConfig, out: Path, **options: Any) -> Run:
    """Train without a display."""
    return execute(config, out, show_progress=False, **options)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], object]) -> None:
    """Call ``stop`` at the end of the step with this number (from 0)."""
    plain = Member.step

    def watched(self: Member, x_BD: torch.Tensor, number: int, want_metrics: bool) -> object:
        metrics = plain(self, x_BD, number, want_metrics)
        if number == step and self.name == "kron":
            stop()
        return metrics

    monkeypatch.setattr(Member, "step", watched)


def ctrl_c() -> None:
    """Raise SIGINT, like Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
