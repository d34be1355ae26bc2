"""Compare training steps of one process with those of several, and count what they send.

In each round process 0 takes a step alone on the whole batch, with one thread, while the others wait; then all take it
together, with one thread each. Efficiency is the time alone divided by the number of processes times the time together,
per round, so that drift of the machine's speed cancels. Work is the same ratio of processor time, which does not depend
on what else the machine does. What is sent is counted at each collective, as a ring sends it.

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
from time import perf_counter, process_time
from typing import Any, NamedTuple

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
PROCESSES = 2
MODES = {"data parallel": 1, "head parallel": PROCESSES}


SPREAD = {"": statistics.median, "_low": min, "_high": max}


class Cost(NamedTuple):
    """Cost of a step: until the last process is done, of all processors, and sent by one process."""

    seconds: float
    processor_seconds: float
    sent_bytes: float


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


def measure(sae: tuple[str, int], mode: str, processes: Team, meter: Meter, rounds: int) -> dict[str, object]:
    """Return the row of one SAE and one mode, in each of the processes."""
    config = parse_sae(SAES[sae])
    x_BD = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
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

    costs: dict[str, list[Cost]] = {"alone": [], "together": []}
    for number in range(rounds + 2):  # two to compile and to allocate
        for what, step in (("alone", step_alone), ("together", step_together)):
            cost = measured(step, processes, meter)
            if number >= 2:
                costs[what].append(cost)
    pairs = list(zip(costs["alone"], costs["together"], strict=True))
    efficiency = [one.seconds / (processes.size * many.seconds) for one, many in pairs]
    work = [one.processor_seconds / many.processor_seconds for one, many in pairs]
    return {
        "sae": sae[0],
        "d_sae": sae[1],
        "mode": mode,
        "processes": processes.size,
        "d_in": D_IN,
        "k": K,
        "batch_tokens": BATCH,
        "alone_seconds": round(statistics.median(one.seconds for one, _ in pairs), 4),
        "together_seconds": round(statistics.median(many.seconds for _, many in pairs), 4),
        **{f"efficiency{name}": round(of(efficiency), 3) for name, of in SPREAD.items()},
        **{f"work{name}": round(of(work), 3) for name, of in SPREAD.items()},
        "sent_megabytes": round(pairs[-1][1].sent_bytes / 1e6, 3),
        "formula_megabytes": round(formula_bytes(*sae, processes.data.size, processes.heads.size) / 1e6, 3),
        "rounds": rounds,
    } | provenance_columns(seed=0)


def measured(step: Callable[[], None], processes: Team, meter: Meter) -> Cost:
    """Return the time until all processes have done ``step``, the processor time of all, and what this one sent."""
    processes.wait()
    started, busy, sent = perf_counter(), process_time(), meter.bytes
    step()
    sent, spent = meter.bytes - sent, torch.tensor(process_time() - busy, dtype=torch.float64)
    processes.wait()
    seconds = perf_counter() - started
    dist.all_reduce(spent)
    return Cost(seconds, float(spent), sent)


def work(rank: int, port: int, rounds: int, results: Any) -> None:
    """Be one of the processes; process 0 gives a row for every SAE and mode."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    meter = Meter()
    with team():
        teams = {mode: Team.of(head_parallel) for mode, head_parallel in MODES.items()}
        for sae in SAES:
            for mode, processes in teams.items():
                row = measure(sae, mode, processes, meter, rounds)
                if rank == 0:
                    results.put(row)


def main() -> None:
    """Measure every SAE in every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distributed_step.csv"))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    started = [
        context.Process(target=work, args=(rank, port, arguments.rounds, results), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    rows = []
    for _ in range(len(SAES) * len(MODES)):
        rows.append(results.get(timeout=1200))
        print({key: value for key, value in rows[-1].items() if key not in provenance_columns(0)}, flush=True)
    for process in started:
        process.join()
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
