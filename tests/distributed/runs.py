"""What a process of `tests.distributed.test_runs` does."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kronsae.data.harvest import ActivationStream
from kronsae.data.store import write_activations
from kronsae.distributed.launch import team
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Interrupted, execute
from kronsae.runs.trainers import Together
from kronsae.training.member import Member


def batches_in_team(config: RunConfig, head_parallel: int, number: int) -> list[tuple[Tensor, Tensor]]:
    """Return the own rows of the first batches, and which share each row of these batches belongs to."""
    with team(head_parallel) as processes:
        assert processes is not None
        trainers = Together(processes)
        stream = trainers.batches(Source(config), None)
        return [
            (batch["layers.2"], trainers.among.holder_B) for (batch, _), _ in zip(stream, range(number), strict=False)
        ]


def run_in_team(config: RunConfig, out: Path, head_parallel: int, stop_after: int | None) -> list[str]:
    """Train; process 1 gets a Ctrl-C after so many steps of the run. Return what was said."""
    said: list[str] = []
    with team(head_parallel) as processes:
        assert processes is not None
        if stop_after is not None and processes.rank == 1:
            _interrupt_at(stop_after - 1)
        try:
            execute(config, out, show_progress=False, say=said.append, team=processes)
        except Interrupted as error:
            if processes.leads:
                said.append(str(error))
    return said


def _interrupt_at(step: int) -> None:
    plain = Member.step

    def watched(self: Member, x_BD: Tensor, number: int, want_metrics: bool) -> Any:
        metrics = plain(self, x_BD, number, want_metrics)
        if number == step and self.name == "kron":
            signal.raise_signal(signal.SIGINT)
        return metrics

    Member.step = watched  # type: ignore[assignment, method-assign]


def harvested(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config of the same run on activations in a folder, which is written."""
    from dataclasses import replace

    source = Source(config)
    make = partial(ActivationStream, source.language_model, config.hooks, source.tokens(held_out=False))
    write_activations(make, folder, d_in=source.widths, tokens=640, shard_bytes=200 * 4 * source.d_in)
    return replace(config, activations=str(folder))
