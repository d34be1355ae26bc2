"""Measure the quickstart's training speed with and without compiled kernels, alternately in separate processes.

python benchmarks/quickstart_paths.py [--tokens 122880] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kronsae.support.files import write_json
from kronsae.support.provenance import provenance

RESULT = Path(__file__).parent / "results" / "quickstart_paths.json"
PATHS = ("portable", "cpu")


def tokens_per_second(path: str, tokens: int) -> dict[str, float]:
    """Return the tokens per second of a short quickstart training, in total and of each SAE's steps alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kronsae", "train", "--recipe", "quickstart", "--tokens", str(tokens)]
        command += ["--out", f"{folder}/run", "--quiet"]
        environment = os.environ | {"KRONSAE_KERNELS": path}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        training = json.loads(Path(folder, "run", "training.json").read_text(encoding="utf-8"))
    steps = {f"{name} steps": training["tokens"] / seconds for name, seconds in training["sae_seconds"].items()}
    return {"in all": training["tokens"] / training["seconds"], **steps}


def main() -> None:
    """Measure, print medians and their ratios, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=122_880)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    for _ in range(arguments.rounds):
        for path in PATHS:
            found[path].append(tokens_per_second(path, arguments.tokens))
    ratios = {}
    for what in found["cpu"][0]:
        medians = {path: statistics.median(run[what] for run in found[path]) for path in PATHS}
        ratios[what] = medians["cpu"] / medians["portable"]
        print(what, {path: round(value) for path, value in medians.items()}, f"ratio {ratios[what]:.2f}")
    about = {"provenance": provenance(), "tokens": arguments.tokens}
    write_json(RESULT, {**about, "tokens_per_second": found, "ratio_of_medians": ratios})


if __name__ == "__main__":
    main()
