"""Run the quickstart with three seeds in separate processes; write docs/results/quickstart.json and README's table.

.venv/bin/python scripts/quickstart_results.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "quickstart.json"
START, END = "<!-- results:quickstart -->", "<!-- /results -->"


def run_once(seed: int) -> dict[str, Any]:
    """Run the quickstart in a separate process; return its summary, wall time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "kronsae", "quickstart", "--out", str(out), "--seed", str(seed), "--quiet"]
        started = perf_counter()
        pid = os.spawnv(os.P_NOWAIT, command[0], command)
        _, status, usage = os.wait4(pid, 0)
        if status != 0:
            raise SystemExit(f"quickstart with seed {seed} failed with status {status}")
        training = json.loads((out / "training.json").read_text(encoding="utf-8"))
        return {
            "seed": seed,
            "wall_seconds": perf_counter() - started,
            "peak_memory_gb": usage.ru_maxrss / 2**20,
            "training_tokens_per_second": training["tokens"] / training["seconds"],
            "report_bytes": (out / "report.html").stat().st_size,
            "saes": json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["saes"],
        }


def table(result: dict[str, Any]) -> str:
    """Return README's table: mean over seeds and the range in brackets."""
    runs = result["runs"]
    lines = [
        "| SAE | latents | encoder parameters | EV | l0 | dead | CE recovered | KL recovered | step time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for index, first in enumerate(runs[0]["saes"]):
        of_sae = [run["saes"][index] for run in runs]

        def cell(key: str, form: str = "{:.3f}", rows: list[dict[str, Any]] = of_sae) -> str:
            values = [row[key] for row in rows]
            spread = f"{form.format(min(values))} to {form.format(max(values))}"
            return f"{form.format(statistics.mean(values))} ({spread})"

        cells = [
            first["name"],
            f"{first['d_sae']:,}",
            f"{first['encoder_parameters']:,}",
            cell("explained_variance"),
            cell("l0", "{:.1f}"),
            cell("dead_share", "{:.1%}"),
            cell("ce_recovered"),
            cell("kl_recovered"),
            cell("seconds", "{:.0f} s"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = result["provenance"]
    wall = max(run["wall_seconds"] for run in runs)
    memory = max(run["peak_memory_gb"] for run in runs)
    lines += [
        "",
        f"Mean over {len(runs)} seeds, range in brackets; {runs[0]['saes'][0]['tokens']:,} training tokens, "
        f"{runs[0]['saes'][0]['evaluation_tokens']:,} held-out tokens. Each run took at most "
        f"{wall / 60:.1f} minutes and {memory:.1f} GB on {about['cores']} cores of {about['processor']} "
        "([all figures](docs/results/quickstart.json); reproduce with `python scripts/quickstart_results.py`).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the result, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table-only", action="store_true", help="only write README's table from the result file")
    arguments = parser.parse_args()
    if not arguments.table_only:
        runs = [run_once(seed) for seed in arguments.seeds]
        write_json(RESULT, {"provenance": provenance(), "runs": runs})
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    write_marked(ROOT / "README.md", START, END, table(result))


if __name__ == "__main__":
    main()
