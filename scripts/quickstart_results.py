"""Run a quickstart with several seeds in separate processes; write its result file and table.

.venv/bin/python scripts/quickstart_results.py [--seeds 0 1 2]                                # README.md
.venv/bin/python scripts/quickstart_results.py --model smollm2 --text english.jsonl.gz        # docs/models.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from kronsae.report.comparison import beside
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- /results -->"
EVALUATIONS = ("evaluation.json", "evaluation-pursuit.json")


@dataclass(frozen=True)
class Place:
    """Result file and page of a model's quickstart, and the mark of its table."""

    result: Path
    page: Path
    mark: str

    @property
    def start(self) -> str:
        """Return the mark at which the table begins."""
        return f"<!-- results:{self.mark} -->"

    @property
    def link(self) -> str:
        """Return the address of the result file, seen from the page."""
        return os.path.relpath(self.result, self.page.parent)


PLACES = {
    "bundled": Place(ROOT / "docs" / "results" / "quickstart.json", ROOT / "README.md", "quickstart"),
    "smollm2": Place(
        ROOT / "docs" / "results" / "quickstart_smollm2.json", ROOT / "docs" / "models.md", "quickstart-smollm2"
    ),
}


def run_once(seed: int, model: str, text: str | None) -> dict[str, Any]:
    """Run the quickstart in a separate process; return its summary, wall time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "kronsae", "quickstart", "--out", str(out), "--seed", str(seed), "--quiet"]
        command += ["--model", model] + ([] if text is None else ["--text", text])
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
            "saes": beside(*(json.loads((out / name).read_text(encoding="utf-8"))["saes"] for name in EVALUATIONS)),
        }


def table(result: dict[str, Any], model: str) -> str:
    """Return the table: mean over seeds and the range in brackets."""
    runs = result["runs"]
    lines = [
        "| SAE | latents | encoder parameters | EV | l0 | dead | CE recovered | KL recovered | all steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for index, first in enumerate(runs[0]["saes"]):
        of_sae = [run["saes"][index] for run in runs]

        def cell(key: str, form: str = "{:.3f}", rows: list[dict[str, Any]] = of_sae) -> str:
            values = [row[key] for row in rows]
            mean = form.format(statistics.mean(values))
            return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"

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
    seeds = f"Mean over {len(runs)} seeds, range in brackets" if len(runs) > 1 else "One seed"
    options = "" if model == "bundled" else f" --model {model} --text FILE"
    lines += [
        "",
        f"{seeds}; {runs[0]['saes'][0]['tokens']:,} training tokens, "
        f"{runs[0]['saes'][0]['evaluation_tokens']:,} held-out tokens. Each run took at most "
        f"{wall / 60:.1f} minutes and {memory:.1f} GB on {about['cores']} cores of {about['processor']} "
        f"([all figures]({PLACES[model].link}); reproduce with `python scripts/quickstart_results.py{options}`).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the result, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    parser.add_argument("--model", choices=list(PLACES), default="bundled")
    parser.add_argument("--text", help="as for kronsae quickstart")
    arguments = parser.parse_args()
    place = PLACES[arguments.model]
    if not arguments.table_only:
        about = provenance()
        runs = [run_once(seed, arguments.model, arguments.text) for seed in arguments.seeds]
        write_json(place.result, {"provenance": about, "runs": runs})
    result = json.loads(place.result.read_text(encoding="utf-8"))
    write_marked(place.page, place.start, END, table(result, arguments.model))


if __name__ == "__main__":
    main()
