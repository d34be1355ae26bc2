"""Time training steps with PyTorch's threads that spin for long, as by default, or briefly (`kronsae.support.openmp`).

OpenMP reads the setting once, so each measurement is a process of `benchmarks/pursuit_step.py`; both take turns.

    python benchmarks/spinning.py [--turns 5] [--out benchmarks/results/spinning.csv]
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from kronsae.support.files import write_csv
from kronsae.support.openmp import NAME, SPINS
from kronsae.support.provenance import provenance_columns

DEFAULT = 300_000
"""GNU OpenMP's own count, where there are no more threads than cores."""


def times(spins: int, size: str) -> dict[str, float]:
    """Return the median time of each step and encoding, in ms, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.csv"
        script = Path(__file__).with_name("pursuit_step.py")
        command = [sys.executable, str(script), "--sizes", size, "--rounds", "7", "--out", str(out)]
        environment = os.environ | {NAME: str(spins)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        with out.open(encoding="utf-8") as file:
            return {row["subject"]: float(row["median_ms"]) for row in csv.DictReader(file)}


def main() -> None:
    """Print the ratios, and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=["256:4096", "768:16384"], help="d_in:d_sae of each size")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for size in arguments.sizes:
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for turn in range(arguments.turns):
            order = (DEFAULT, SPINS) if turn % 2 == 0 else (SPINS, DEFAULT)
            of_turn = {spins: times(spins, size) for spins in order}
            long, brief = of_turn[DEFAULT], of_turn[SPINS]
            for subject in long:
                found[subject].append((long[subject], brief[subject]))
        d_in, d_sae = map(int, size.split(":"))
        for subject, pairs in found.items():
            ratios = [long / brief for long, brief in pairs]
            row: dict[str, object] = {"subject": subject, "d_in": d_in, "d_sae": d_sae, "turns": arguments.turns}
            row |= {"long_ms": round(statistics.median(long for long, _ in pairs), 2)}
            row |= {"brief_ms": round(statistics.median(brief for _, brief in pairs), 2)}
            row |= {"ratio": round(statistics.median(ratios), 3)}
            row |= {"lowest_ratio": round(min(ratios), 3), "highest_ratio": round(max(ratios), 3)}
            rows.append(row | provenance_columns(0))
            print(
                f"{d_sae:6d} {subject:40s} {row['long_ms']:>8} ms {row['brief_ms']:>8} ms  {row['ratio']}", flush=True
            )
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
