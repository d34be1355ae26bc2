"""Build SAEBench's environment by its command and run its evaluations; write docs/results/saebench.json and the page.

.venv/bin/python scripts/saebench_results.py [--table-only]

Two small SAEs are trained on the bundled model first. The environment is built in an empty cache, as on a machine that
never had it; the evaluations then run without network. Their settings are reduced, so that they take minutes on two
cores; the figures show that the command works, not how good the SAEs are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from study_parts import END, RESULTS, ROOT, made_with, markdown_rows

import kronsae as ks
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.resources import format_bytes, size_bytes

RESULT = RESULTS / "saebench.json"
PAGE = ROOT / "docs" / "saebench.md"
START = "<!-- results:saebench -->"
WORDS = 260
SETTINGS = {
    "meta_structure": ("train_steps=200", "train_batch_size=64"),
    "sparse_probing_sae_probes": ('dataset_names=["87_glue_cola"]', "ks=[1, 5]"),
    "absorption": ("max_k_value=2", "k_sparse_probe_num_epochs=2", "min_feats_for_eval=1", "min_GT_probe_f1=0.0"),
}
"""Reduced settings of each evaluation; absorption's limits on probes are lifted, as the bundled model cannot spell."""

SHOWN = {
    "meta_structure": ("decoder_fraction_variance_explained",),
    "sparse_probing_sae_probes": ("sae_top_1_test_accuracy", "sae_top_5_test_accuracy"),
    "absorption": ("mean_absorption_fraction_score", "mean_full_absorption_score"),
}
"""Scores of each evaluation on the page."""


def timed(words: list[str], variables: dict[str, str]) -> tuple[float, str]:
    """Run a command of kronsae in a process of its own; return its seconds and output."""
    started = perf_counter()
    command = [sys.executable, "-m", "kronsae", *words]
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"`kronsae {' '.join(words)}` failed with status {done.returncode}")
    return perf_counter() - started, done.stdout


def measure(folder: Path) -> dict[str, Any]:
    """Train, build the environment, evaluate; return what the page shows."""
    ks.train(
        model="bundled",
        text="bundled",
        hook="layers.3",
        tokens=65_536,
        batch_tokens=1024,
        buffer_tokens=16_384,
        saes=[ks.topk(d_sae=512, k=16, lr=4e-3), ks.kron(num_heads=64, d_base=2, d_extension=4, k=16, lr=4e-3)],
        out=folder / "run",
    )
    cache = {"KRONSAE_CACHE": str(folder / "cache")}
    built, _ = timed(["saebench", "--prepare"], cache)
    size = size_bytes(folder / "cache" / "environments")
    evaluations = []
    for name, settings in SETTINGS.items():
        options = [word for one in settings for word in ("--set", f"{name}.{one}")]
        words = ["saebench", str(folder / "run"), "--evals", name, "--out", str(folder / "out"), "--json", *options]
        if name == "absorption":
            words += ["--words", str(WORDS)]
        seconds, said = timed(words, cache | {"HF_HUB_OFFLINE": "1"})
        rows = [{key: row[key] for key in ("sae", "metrics", "reason")} for row in json.loads(said)["results"]]
        evaluations.append({"name": name, "settings": list(settings), "seconds": seconds, "rows": rows})
    return {"prepare": {"seconds": built, "bytes": size}, "evaluations": evaluations}


def markdown(kept: dict[str, Any]) -> str:
    """Return the table, and where and when it was measured."""
    rows = []
    for one in kept["evaluations"]:
        scores = SHOWN[one["name"]]
        for row in one["rows"]:
            found = "; ".join(f"{score} {row['metrics'][score]:.3f}" for score in scores if score in row["metrics"])
            rows.append([one["name"], row["sae"], found or row["reason"], f"{one['seconds']:.0f} s"])
    prepared = kept["prepare"]
    return "\n".join(
        [
            *markdown_rows(["evaluation", "SAE", "scores", "both SAEs"], rows),
            "",
            f"`--prepare` took {prepared['seconds'] / 60:.1f} minutes and {format_bytes(prepared['bytes'])} on disk. "
            f"{made_with(kept['provenance'], RESULT, 'results')}",
        ]
    )


def main() -> None:
    """Measure, write the result, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table-only", action="store_true", help="only write the page from the result file")
    if not parser.parse_args().table_only:
        with tempfile.TemporaryDirectory() as name:
            found = measure(Path(name))
        write_json(RESULT, {"provenance": provenance()} | found)
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
