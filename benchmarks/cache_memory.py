"""Measure the memory of a training whose activations on disk are larger than the memory that it may allocate.

All layers of the bundled model are harvested in float32 into a folder of several gigabytes, and one SAE per layer is
trained on it, so that the whole of every row is read. The training runs in a new process with a limit of RLIMIT_DATA,
which bounds what a process allocates, and not the files that it maps to read: these are in the system's file cache,
which the system drops when it needs memory. An array of the folder's size is refused in that process. Recorded are its
allocated memory (``RssAnon`` of ``/proc/self/status``, every 10 ms) and its speed; the time is that of the whole
training, in which also the digests of all files are compared. Linux only.

    python benchmarks/cache_memory.py --place FOLDER [--tokens 524288] [--limit-mb 1024]
        [--out benchmarks/results/cache_memory.csv]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

MB = 2**20
LAYERS, D_SAE, K, BATCH = 6, 512, 16, 1024
ORDERS = ("random", "harvested")


def anonymous_bytes() -> int:
    """Return the allocated memory of this process that is in use now."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak(Thread):
    """Keeps the peak of `anonymous_bytes`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, Event()

    def run(self) -> None:
        """Look every 10 ms."""
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        """Return the peak."""
        self._over.set()
        self.join()
        return max(self.bytes, anonymous_bytes())


def train(folder: Path, order: str, limit_mb: int, tokens: int, out: Path) -> None:
    """Train under the limit, and print what was measured as JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * MB, limit_mb * MB))
    import torch

    from kronsae.data.manifest import read_manifest
    from kronsae.runs.parsing import RunOptions, parse_sae
    from kronsae.runs.run import execute

    torch.set_num_threads(1)
    folder_bytes = sum(shard.bytes or 0 for shard in read_manifest(folder).shards)
    try:
        torch.empty(folder_bytes, dtype=torch.uint8)
        refused = False
    except RuntimeError:
        refused = True
    saes = [f"topk d_sae={D_SAE} k={K} read=layers.{layer} name=layer{layer}" for layer in range(LAYERS)]
    settings = [f"loop.batch_tokens={BATCH}", f"buffer_tokens={16 * BATCH}", f"activation_order={order}"]
    settings += ["loop.log_every=1"]
    budget: dict[str, Any] = {"tokens": tokens, "flops": None, "same_flops_as": None}
    config = RunOptions(activations=folder).run_config([parse_sae(words, 0) for words in saes], budget, 0, settings)
    before = anonymous_bytes()
    peak = Peak()
    peak.start()
    started = perf_counter()
    execute(config, out, show_progress=False)
    seconds = perf_counter() - started
    found = {"folder_bytes": folder_bytes, "refused": refused, "before_bytes": before, "peak_bytes": peak.stop()}
    print(json.dumps(found | {"seconds": seconds}))


def main() -> None:
    """Harvest, train in both orders, and write what was measured with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--place", type=Path, required=True, help="folder for the activations and the runs")
    parser.add_argument("--tokens", type=int, default=2**19)
    parser.add_argument("--limit-mb", type=int, default=1024)
    parser.add_argument("--order", choices=ORDERS, help="train in this order only, in this process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.place / "activations"
    if arguments.order is not None:
        train(folder, arguments.order, arguments.limit_mb, arguments.tokens, arguments.place / arguments.order)
        return

    from kronsae.runs.harvest import harvest
    from kronsae.support.files import write_csv
    from kronsae.support.progress import progress_bar
    from kronsae.support.provenance import provenance_columns

    with progress_bar("harvesting") as progress:
        hooks = [f"layers.{layer}" for layer in range(LAYERS)]
        harvest(model="bundled", text="bundled", hook=hooks, tokens=arguments.tokens, out=folder, progress=progress)
    rows: list[dict[str, object]] = []
    for order in ORDERS:
        command = [sys.executable, __file__, "--place", str(arguments.place), "--order", order]
        command += ["--tokens", str(arguments.tokens), "--limit-mb", str(arguments.limit_mb)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{order}: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        row: dict[str, object] = {"order": order, "folder_mb": round(found["folder_bytes"] / MB)}
        row |= {"limit_mb": arguments.limit_mb, "folder_refused": found["refused"]}
        row |= {f"{what}_anonymous_mb": round(found[f"{what}_bytes"] / MB) for what in ("before", "peak")}
        row |= {"tokens": arguments.tokens, "tokens_per_second": round(arguments.tokens / found["seconds"])}
        row |= {"hooks": LAYERS, "d_in": 256, "d_sae": D_SAE, "k": K, "batch": BATCH} | provenance_columns(0)
        rows.append(row | {"threads": 1})
        print(row, flush=True)
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
