"""Interleaved timing: each round runs one step of every contestant, so slow drifts of the machine affect all alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from kronsae.bench.subjects import Subject

BATCHES = 4  # different batches in turn, so that no contestant gets the same tokens twice in a row


@dataclass(frozen=True)
class Timing:
    """Duration of one contestant's steps in milliseconds: median and quartiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @staticmethod
    def of(milliseconds: list[float]) -> Timing:
        """Return median and quartiles of the given durations."""
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return Timing(median, low, high, len(milliseconds))


def interleaved(
    subjects: Mapping[str, Subject], batch: int, d_in: int, rounds: int, seed: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time one step of every contestant per round; the first ``warmup`` rounds do not count."""
    times = interleaved_times(subjects, batch, d_in, rounds, seed, warmup)
    return {name: Timing.of(values) for name, values in times.items()}


def interleaved_times(
    subjects: Mapping[str, Subject], batch: int, d_in: int, rounds: int, seed: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Run `interleaved` and return the milliseconds of each round."""
    batches = make_batches(batch, d_in, seed)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to the contestant that happens to run
    try:
        for turn in range(warmup + rounds):
            for name, subject in subjects.items():
                x_BD = batches[turn % len(batches)]
                started = perf_counter()
                subject.step(x_BD)
                elapsed = 1000 * (perf_counter() - started)
                if turn >= warmup:
                    times[name].append(elapsed)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


def make_batches(batch: int, d_in: int, seed: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return seeded batches of normal activations, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, d_in, generator=generator).to(device) for _ in range(BATCHES)]
