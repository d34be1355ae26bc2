"""Check that one hundred new processes compute the same bits.

This benchmark detects race conditions at start-up. The first computation of each process is the seeded case of
``tests/kernels/test_repeatability.py`` (selection, decode, gradients, optimiser step) on all threads, of which it
prints a hash.

    python benchmarks/fresh_processes.py [--processes 100] [--out benchmarks/results/fresh_processes.csv]
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
from pathlib import Path

from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns

ROOT = Path(__file__).parents[1]
CODE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[2]))
from tests.kernels.test_repeatability import digest
print(digest())
"""


def main() -> int:
    """Run the processes one after another with two threads each; return 1 if any two results differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-c", CODE, str(ROOT), str(arguments.threads)]
    found: collections.Counter[str] = collections.Counter()
    for _ in range(arguments.processes):
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            print(process.stderr, file=sys.stderr)
            return 1
        found[process.stdout.strip()] += 1
    print(f"{arguments.processes} processes, {len(found)} distinct results")
    if arguments.out is not None:
        row = {"processes": arguments.processes, "different_results": len(found), **provenance_columns(11)}
        row["threads"] = arguments.threads
        write_csv(arguments.out, [row])
    return 0 if len(found) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
