"""Compare training steps of one process with those of several, and count what they send.

In each round process 0 takes a step alone on the whole batch, with one thread, while the others wait; then all take it
together, with one thread each. Efficiency is the time alone divided by the number of processes times the time together,
per round, so that drift of the machine's speed cancels. What is sent is counted at each collective, as a ring sends it.

    python benchmarks/distributed_step.py [--rounds 9] [--out benchmarks/results/distributed_step.csv]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kronsae.core.shares import sharing
from kronsae.distributed.heads import HeadSplit
from kronsae.distributed.launch import team
from kronsae.distributed.shares import TokenShares
from kronsae.distributed.team import Team
from kronsae.runs.parsing import parse_sae
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.training.member import Member

D_IN, BATCH, K = 256, 1024, 32
M, N = 2, 4
SAES = {
    ("TopK", 4096): f"topk d_sae=4096 k={K}",
    ("KronSAE", 4096): f"kron d_sae=4096 d_base={M} d_extension={N} k={K}",
    ("KronSAE", 65536): f"kron d_sae=65536 d_base={M} d_extension={N} k={K}",
}
MODES = {"data parallel": (2, 1), "head parallel": (2, 2)}


class Meter:
    """Counts the bytes that this process sends, as a ring sends them."""

    def __init__(self) -> None:
        self.bytes = 0.0
        reduce, gather = dist.all_reduce, dist.all_gather

        def all_reduce(tensor: Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
            size = dist.get_world_size(group)
            self.bytes += 2 * (size - 1) / size * tensor.nbytes
            return reduce(tensor, *arguments, group=group, **options)

        def all_gather(tensors: list[Tensor], tensor: Tensor, group: Any = None, **options: Any) -> Any:
            self.bytes += (dist.get_world_size(group) - 1) * tensor.nbytes
            return gather(tensors, tensor, group=group, **options)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def formula_bytes(kind: str, d_sae: int, shares: int, parts: int) -> float:
    """Return what docs/distributed.md says that a process sends in a step without dead latents."""
    own = BATCH / shares
    ring = 2 * (shares - 1) / shares
    rows, entries = (d_sae, 8 * K) if kind == "TopK" else (d_sae // (M * N) * (M + N), 16 * K)
    decoder = min(ring * 4 * d_sae * D_IN / parts, (shares - 1) * own * (8 * K + 4 * D_IN))
    encoder = min(ring * 4 * rows * D_IN / parts, (shares - 1) * own * (entries + 4 * D_IN))
    others = ring * (4 * (rows / parts + D_IN) + d_sae)
    heads = (parts - 1) * own * 16 * K + 2 * (parts - 1) / parts * 4 * own * D_IN
    return decoder + encoder + others + heads


def measure(sae: tuple[str, int], mode: str, rounds: int) -> dict[str, object]:
    """Return the row of one SAE and one mode, in each of the processes."""
    _, head_parallel = MODES[mode]
    config = parse_sae(SAES[sae])
    x_BD = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    meter = Meter()
    with team(head_parallel) as processes:
        assert processes is not None
        among = TokenShares(processes.data)
        holder_B = torch.arange(BATCH) % processes.data.size
        among.begin(holder_B)
        own_BD = x_BD[holder_B == processes.data.me]
        alone = Member(config, D_IN, "bench", 10_000) if processes.leads else None
        together = Member(config, D_IN, "bench", 10_000, split=HeadSplit(processes.heads, among))

        def step_together() -> None:
            with sharing(among):
                together.step(own_BD, 0, want_metrics=False)

        def step_alone() -> None:
            if alone is not None:
                alone.step(x_BD, 0, want_metrics=False)

        times: dict[str, list[float]] = {"alone": [], "together": []}
        for number in range(rounds + 2):  # two to compile and to allocate
            before = meter.bytes
            for what, step in (("alone", step_alone), ("together", step_together)):
                seconds = timed(step, processes)
                if number >= 2:
                    times[what].append(seconds)
            sent = meter.bytes - before - 4 * 2 * (processes.size - 1) / processes.size  # the meetings of `timed`
        ratios = [one / (processes.size * many) for one, many in zip(*times.values(), strict=True)]
        return {
            "sae": sae[0],
            "d_sae": sae[1],
            "mode": mode,
            "processes": processes.size,
            "d_in": D_IN,
            "k": K,
            "batch_tokens": BATCH,
            "alone_seconds": round(statistics.median(times["alone"]), 4),
            "together_seconds": round(statistics.median(times["together"]), 4),
            "efficiency": round(statistics.median(ratios), 3),
            "efficiency_low": round(min(ratios), 3),
            "efficiency_high": round(max(ratios), 3),
            "sent_megabytes": round(sent / 1e6, 3),
            "formula_megabytes": round(formula_bytes(*sae, processes.data.size, processes.heads.size) / 1e6, 3),
            "rounds": rounds,
        } | provenance_columns(seed=0)


def timed(step: Callable[[], None], processes: Team) -> float:
    """Return the time until all processes have done ``step``."""
    processes.wait()
    started = perf_counter()
    step()
    processes.wait()
    return perf_counter() - started


def work(rank: int, port: int, sae: tuple[str, int], mode: str, rounds: int, results: Any) -> None:
    """Be one of the processes."""
    size, _ = MODES[mode]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    row = measure(sae, mode, rounds)
    if rank == 0:
        results.put(row)


def main() -> None:
    """Measure every SAE in every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distributed_step.csv"))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for sae in SAES:
        for mode, (size, _) in MODES.items():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            results = context.Queue()
            started = [
                context.Process(target=work, args=(rank, port, sae, mode, arguments.rounds, results))
                for rank in range(size)
            ]
            for process in started:
                process.start()
            rows.append(results.get(timeout=600))
            for process in started:
                process.join()
            print({key: value for key, value in rows[-1].items() if key not in provenance_columns(0)}, flush=True)
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
