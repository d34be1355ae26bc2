"""Measure how shuffled windows and partial buffer refills affect training; write mixing.json and mixing.svg.

.venv/bin/python scripts/mixing_results.py [--seeds 0 1] [--tokens 400000] [--threads 2] [--table-only]

The script also writes the table of docs/results/README.md. It trains quickstart's two SAEs and logs every step, with
this commit and with the last commit before the change (`BEFORE`). Each training has a separate process, and the two
commits alternate within every seed. Both read the same text, a file with the documents of the current bundled corpus in
their order. This commit evaluates both on the same held-out text.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from study_parts import END, RESULTS, ROOT, made_with, markdown_rows, mean_and_range

from kronsae.bench.plot import save_figure
from kronsae.data.buffer import buffer_order
from kronsae.data.corpus import standard_library_documents
from kronsae.runs.recipes import quickstart
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say

BEFORE = "5248738"
RESULT = RESULTS / "mixing.json"
PLOT = RESULTS / "mixing.svg"
PAGE = RESULTS / "README.md"
START = "<!-- results:mixing -->"
CELLS = {"before": "cells_before_mixing.csv", "after": "cells.csv"}
SMOOTHED_STEPS = 16
"""Steps before and after a refill over which EV is averaged, in addition to seeds, because EV of one batch is noisy."""


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Yield a temporary checkout of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def write_text_file(path: Path) -> None:
    """Write the documents of the bundled corpus, in their order, as a ``.jsonl`` file."""
    rows = (json.dumps({"text": document.text}) + "\n" for document in standard_library_documents())
    path.write_text("".join(rows), encoding="utf-8")


def train(source: Path, text: Path, seed: int, tokens: int, threads: int) -> dict[str, Any]:
    """Train in a separate process with the package of a checkout; return training EV, costs and held-out results."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "kronsae", "train", "--recipe", "quickstart", "--seed", str(seed), "--quiet"]
        command += ["--tokens", str(tokens), "--set", "loop.log_every=1", "--text", str(text), "--out", str(out)]
        started = perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": str(threads)}
        pid = os.spawnve(os.P_NOWAIT, command[0], command, environment)
        _, status, usage = os.wait4(pid, 0)
        if status != 0:
            raise SystemExit(f"the training from {source} failed with status {status}")
        wall_seconds = perf_counter() - started
        subprocess.run([sys.executable, "-m", "kronsae", "eval", str(out), "--quiet"], check=True, capture_output=True)
        evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_step = {name: [row for row in rows if row["sae"] == name] for name in dict.fromkeys(row["sae"] for row in rows)}
    last = rows[-1]
    return {
        "seed": seed,
        "tokens": last["tokens"],
        "first_step_seconds": rows[0]["seconds"],
        "training_seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "wall_seconds": wall_seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_gb": usage.ru_maxrss / 2**20,
        "held_out_ev": {row["name"]: row["explained_variance"] for row in evaluation["saes"]},
        "ev": {name: [round(row["explained_variance"], 5) for row in of] for name, of in by_step.items()},
    }


def refills(order: str, batch_tokens: int, buffer_tokens: int, steps: int) -> list[int]:
    """Return the steps after which the buffer is refilled, completely with "before" and partially otherwise."""
    if order == "before":
        every = buffer_tokens // batch_tokens
        return list(range(every, steps, every))
    parts = buffer_order(batch_tokens, buffer_tokens, 0).parts
    found = [0]
    while found[-1] < steps:
        found.append(found[-1] + min(len(found), parts))
    return found[1:-1]


def mean_ev(runs: list[dict[str, Any]], name: str) -> list[float]:
    """Return the EV of each step's batch, mean over the seeds."""
    return [statistics.mean(values) for values in zip(*(run["ev"][name] for run in runs), strict=True)]


def drops(ev: list[float], places: list[int]) -> list[float]:
    """Return, for each step in ``places``, the mean EV of `SMOOTHED_STEPS` steps before it minus that after it."""
    n = SMOOTHED_STEPS
    inside = [place for place in places if n <= place <= len(ev) - n]
    return [statistics.mean(ev[place - n : place]) - statistics.mean(ev[place : place + n]) for place in inside]


def figures(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the largest drops of EV and the final EV of each order and SAE."""
    settings, found = kept["settings"], []
    for order, runs in kept["runs"].items():
        steps = settings["tokens"] // settings["batch_tokens"]
        places = refills(order, settings["batch_tokens"], settings["buffer_tokens"], steps)
        for name in runs[0]["ev"]:
            ev = mean_ev(runs, name)
            at_refills = drops(ev, places)
            found.append(
                {
                    "order": order,
                    "sae": name,
                    "refills": len(at_refills),
                    "largest_drop": max(at_refills),
                    "largest_drop_anywhere": max(drops(ev, list(range(len(ev))))),
                    "last_ev": statistics.mean(ev[-SMOOTHED_STEPS:]),
                    "held_out_ev": [run["held_out_ev"][name] for run in runs],
                }
            )
    return found


def cells() -> list[str]:
    """Return the table of held-out EV of ten architectures, before the change and now: the two CSVs of one study."""
    by_order = {order: explained_variance(RESULTS / file) for order, file in CELLS.items()}
    rows = []
    for name, after in by_order["after"].items():
        before = by_order["before"][name]
        difference = f"{statistics.mean(after) - statistics.mean(before):+.4f}"
        rows.append([name, *(mean_and_range(values, "{:.4f}") for values in (before, after)), difference])
    return markdown_rows(["SAE, 2,048 latents, k = 32", "EV before", "EV after", "difference"], rows)


def explained_variance(path: Path) -> dict[str, list[float]]:
    """Return the held-out EV of each SAE of a study, one per seed."""
    found: dict[str, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append(float(row["explained_variance"]))
    return found


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page."""
    settings, runs = kept["settings"], kept["runs"]
    rows = [
        [
            row["order"],
            row["sae"],
            str(row["refills"]),
            f"{row['largest_drop']:.4f}".replace("-", "−"),
            f"{row['largest_drop_anywhere']:.4f}".replace("-", "−"),
            f"{row['last_ev']:.4f}",
            mean_and_range(row["held_out_ev"], "{:.4f}"),
        ]
        for row in figures(kept)
    ]
    cost = [
        [
            order,
            mean_and_range([run["first_step_seconds"] for run in of], "{:.1f} s"),
            f"{statistics.median(run['tokens_per_second'] for run in of):,.0f}",
            mean_and_range([run["tokens_per_second"] for run in of], "{:,.0f}"),
            mean_and_range([run["processor_seconds"] for run in of], "{:.0f} s"),
            mean_and_range([run["peak_memory_gb"] for run in of], "{:.2f} GB"),
        ]
        for order, of in runs.items()
    ]
    headings = [
        "order",
        "SAE",
        "refills",
        "largest drop of EV at a refill",
        "largest drop at any step",
        "training EV, last steps",
        "held-out EV",
    ]
    costs = ["order", "first step after", "tokens/s, median", "tokens/s, mean", "processor time", "peak memory"]
    return "\n".join(
        [
            *markdown_rows(headings, rows),
            "",
            f"The drop is the mean training EV of the {SMOOTHED_STEPS} steps before minus that of the {SMOOTHED_STEPS} "
            f"steps after, averaged over {len(runs['after'])} seeds; a negative drop is an increase. "
            f"{settings['tokens']:,} training tokens, {settings['batch_tokens']:,} tokens per step, a buffer of "
            f"{settings['buffer_tokens']:,} tokens and a pool of {settings['window_pool_tokens']:,} tokens.",
            "",
            *markdown_rows(costs, cost),
            "",
            f"Mean, range in brackets; {settings['threads']} thread(s). Both orders were trained alternately on a "
            f'machine with other load. "before" is commit {kept["before"]}. '
            f"{made_with(kept['provenance'], RESULT, '.')}",
            "",
            *cells(),
            "",
            "Mean, range over seeds in brackets; the two CSV files name commit and machine. Besides mixing, the corpus "
            "changed between them: generated tables were removed, also from the held-out text.",
        ]
    )


def plot(kept: dict[str, Any]) -> None:
    """Plot the EV of every step against tokens, with the refills, in one panel per SAE."""
    from matplotlib.figure import Figure

    settings, names = kept["settings"], list(kept["runs"]["after"][0]["ev"])
    figure = Figure(figsize=(9, 3.2 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), sharex=True), names, strict=True):
        for order, color, place in (("before", "tab:red", 0.0), ("after", "tab:blue", 0.06)):
            ev = mean_ev(kept["runs"][order], name)
            tokens = [settings["batch_tokens"] * (step + 1) for step in range(len(ev))]
            axes.plot(tokens, ev, color=color, linewidth=1, label=order)
            for step in refills(order, settings["batch_tokens"], settings["buffer_tokens"], len(ev)):
                axes.axvline(step * settings["batch_tokens"], place, place + 0.05, color=color, linewidth=1)
        axes.set(ylabel=f"EV, {name}", ylim=(0.4, None))
        axes.legend(loc="center right")
    axes.set_xlabel("training tokens (marks at the bottom: buffer refills)")
    save_figure(figure, PLOT)


def main() -> None:
    """Train with every seed, then write the result file, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table-only", action="store_true", help="only write table and plot from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        recipe = quickstart()
        settings = {
            "tokens": asked.tokens // recipe.loop.batch_tokens * recipe.loop.batch_tokens,
            "batch_tokens": recipe.loop.batch_tokens,
            "saes": [sae.name for sae in recipe.saes],
            "buffer_tokens": recipe.buffer_tokens,
            "window_pool_tokens": recipe.pool_tokens,
            "threads": asked.threads,
        }
        about = provenance()
        runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        with worktree(BEFORE) as before, worktree("HEAD") as after, tempfile.TemporaryDirectory() as folder:
            write_text_file(text := Path(folder) / "corpus.jsonl")
            for seed in asked.seeds:
                for order, source in (("before", before), ("after", after)):
                    runs[order].append(train(source, text, seed, settings["tokens"], asked.threads))
                    say(f"Seed {seed}, {order}: {runs[order][-1]['wall_seconds']:.0f} s.")
        kept = {"provenance": about, "before": BEFORE, "settings": settings, "runs": runs}
        write_json(RESULT, kept | {"figures": figures(kept)})
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    plot(kept)
    write_marked(PAGE, START, END, markdown(kept))


if __name__ == "__main__":
    main()
