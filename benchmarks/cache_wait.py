"""Measure which share of a training's time is spent waiting for activations from disk.

Random activations are written in two precisions and read in both orders, by a training step of KronSAE with F = 2^15.
Each round trains a block of steps on every kind of folder in turn. The first steps of a block do not count, because
their batches were read ahead during the other blocks. ``read_ms`` is the time of a batch without training: where it is
below the time of a step, reading ahead hides it.

    python benchmarks/cache_wait.py [--rounds 7] [--out benchmarks/results/cache_wait.csv]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kronsae.bench.measure import Timing
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.prefetch import DEPTH, Prefetched
from kronsae.data.store import write_activations
from kronsae.data.stored import HarvestedRows, StoredActivations
from kronsae.data.stream import State
from kronsae.runs.parsing import parse_sae
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.training.member import Member

HOOK, ITEM_ROWS, COUNTED_STEPS = "bench", 1024, 4
KINDS = [(dtype, order) for dtype in ("float32", "int8") for order in ("random", "harvested")]


class Normal:
    """Yield items of normal activations; item i depends only on i."""

    def __init__(self, d_in: int, *, state: State | None = None) -> None:
        self._d_in = d_in
        self._first = 0 if state is None else state["item"]

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], State]]:
        item = self._first
        while True:
            generator = torch.Generator().manual_seed(item)
            item += 1
            yield {HOOK: torch.randn(ITEM_ROWS, self._d_in, generator=generator)}, {"item": item}


def batches(folder: Path, order: str, batch: int) -> Iterator[Tensor]:
    """Yield batches as a training reads them."""
    stream: Any = StoredActivations(folder, batch_size=batch)
    if order == "harvested":
        stream = Prefetched(ShuffleBuffer(partial(HarvestedRows, folder), batch_size=batch, buffer_tokens=16 * batch))
    for values, _ in stream:
        yield values[HOOK]


def block(stream: Iterator[Tensor], member: Member) -> tuple[float, float]:
    """Train a block of steps; return the seconds of waiting and of training of those that count."""
    waited = trained = 0.0
    for step in range(DEPTH + 2 + COUNTED_STEPS):
        started = perf_counter()
        x_BD = next(stream)
        arrived = perf_counter()
        member.step(x_BD, step, want_metrics=False)
        if step >= DEPTH + 2:
            waited += arrived - started
            trained += perf_counter() - arrived
    return waited, trained


def main() -> None:
    """Print the shares, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=2**15)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2**16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    words = f"kron d_sae={arguments.d_sae} d_base=2 d_extension=4 k={arguments.k}"
    member = Member(parse_sae(words), arguments.d_in, HOOK, steps=10_000)
    with tempfile.TemporaryDirectory() as place:
        for dtype in ("float32", "int8"):
            write_activations(
                partial(Normal, arguments.d_in),
                Path(place) / dtype,
                d_in={HOOK: arguments.d_in},
                tokens=arguments.tokens,
                shard_bytes=2**25,
                dtype=dtype,
            )
        streams = {kind: batches(Path(place) / kind[0], kind[1], arguments.batch) for kind in KINDS}
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
        for turn in range(arguments.rounds + 1):
            for kind in KINDS:
                waited, trained = block(streams[kind], member)
                fresh = batches(Path(place) / kind[0], kind[1], arguments.batch)
                list(islice(fresh, DEPTH + 2))
                started = perf_counter()
                list(islice(fresh, COUNTED_STEPS))
                if turn > 0:  # the first round compiles
                    found[kind].append((waited, trained, perf_counter() - started))
    rows = []
    for kind, times in found.items():
        share = Timing.of([100 * waited / (waited + trained) for waited, trained, _ in times])
        step, read = (Timing.of([1000 * one[at] / COUNTED_STEPS for one in times]) for at in (1, 2))
        row: dict[str, object] = {"dtype": kind[0], "order": kind[1], "d_in": arguments.d_in}
        row |= {"d_sae": arguments.d_sae, "k": arguments.k, "batch": arguments.batch, "tokens": arguments.tokens}
        row |= {"rounds": share.rounds, "wait_percent": round(share.median_ms, 3)}
        row |= {"low_quartile_percent": round(share.low_ms, 3), "high_quartile_percent": round(share.high_ms, 3)}
        row |= {"step_ms": round(step.median_ms, 1), "read_ms": round(read.median_ms, 1)}
        rows.append(row | provenance_columns(0))
        print(
            f"{kind[0]:8s} {kind[1]:10s} waits {share.median_ms:.2f}% of the time; step {step.median_ms:.0f} ms, "
            f"read {read.median_ms:.0f} ms",
            flush=True,
        )
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
