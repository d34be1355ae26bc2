"""Measure absorption of TopK, KronSAE and Matryoshka at l0 16, 32 and 64; write docs/results/absorption.json.

.venv/bin/python scripts/absorption_study.py [--seeds 0 1 2] [--out runs/absorption-study] [--table-only]

The script also writes the table of docs/measurements/absorption.md. Each seed is a run of nine SAEs on one stream; the
examples are the same for all seeds. The same command resumes an interrupted study.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from study_parts import (
    END,
    MEASUREMENTS,
    RESULTS,
    chance,
    made_with,
    markdown_rows,
    mean_and_range,
    reconstruction,
    side,
    trained,
)

from kronsae.measures.absorption import AbsorptionSettings, measure
from kronsae.runs import recipes
from kronsae.runs.architectures import matryoshka
from kronsae.runs.config import RunConfig
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say
from kronsae.training.config import MemberConfig

RESULT = RESULTS / "absorption.json"
PAGE = MEASUREMENTS / "absorption.md"
START = "<!-- results:absorption -->"

L0S = (16, 32, 64)
FORMS = ("topk", "kron", "matryoshka")
D_SAE = 2048
LR = 8e-3  # the same for all SAEs
KEYS = (
    "mean_absorption_fraction",
    "mean_full_absorption",
    "mean_num_split_latents",
    "mean_f1",
    "explained_variance",
    "dead_share",
)


def members(seed: int, d_sae: int) -> tuple[MemberConfig, ...]:
    """Return each SAE type with each l0."""
    found = []
    for k in L0S:
        common: dict[str, Any] = {"k": k, "lr": LR, "init_norm": 0.5, "dead_after_tokens": 100_000, "seed": seed}
        found += [
            recipes.topk(d_sae=d_sae, name=f"topk-{k}", **common),
            recipes.kron(num_heads=d_sae // 8, d_base=2, d_extension=4, name=f"kron-{k}", **common),
            matryoshka(d_sae=d_sae, smallest=d_sae // 8, name=f"matryoshka-{k}", **common),
        ]
    return tuple(found)


def config(seed: int, tokens: int, d_sae: int) -> RunConfig:
    """Return the run's config, with the model, text and hook of the quickstart."""
    base = recipes.quickstart()
    loop = replace(base.loop, tokens=tokens, batch_tokens=1024, log_every=20, checkpoint_every=1000)
    return replace(base, saes=members(seed, d_sae), loop=loop, buffer_tokens=65_536, seed=seed)


def run_seed(seed: int, out: Path, tokens: int, d_sae: int, windows: int | None) -> dict[str, Any]:
    """Train nine SAEs with one seed; return their absorption. Examples and probes always use seed 0."""
    started = perf_counter()
    run = trained(config(seed, tokens, d_sae), out / f"seed-{seed}")
    measuring = perf_counter()
    settings = AbsorptionSettings(task="roles", windows=windows)
    result = measure(run, settings, cache=out / "activations", say=say)
    figures = reconstruction(run)
    rows = []
    for name, one in result["saes"].items():
        form, _, k = name.rpartition("-")
        means = {key: one[key] for key in KEYS if key in one}
        classes = {of["name"]: of["fraction"] for of in one["classes"]}
        rows.append({"form": form, "k": int(k), **means, **figures[name], "fraction_by_class": classes})
    return {
        "seed": seed,
        "training_seconds": measuring - started,
        "measuring_seconds": perf_counter() - measuring,
        "examples": result["examples"],
        "probe_f1": result["probe_f1"],
        "saes": rows,
    }


def verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each l0 on the ratio of KronSAE's absorption to TopK's, per seed."""
    found = []
    for k in L0S:
        ratios = []
        for run in runs:
            of_form = {row["form"]: row for row in run["saes"] if row["k"] == k}
            own, other = (of_form[form]["mean_absorption_fraction"] for form in ("kron", "topk"))
            ratios.append(own / other if other > 0 else math.inf if own > 0 else 1.0)
        found.append(
            f"- l0 = {k}: the ratio of KronSAE's absorption fraction to TopK's is {mean_and_range(ratios, '{:.2f}')}, "
            f"{side(ratios, 1, 'below 1', 'above 1', 'not on the same side of 1 in every seed')}."
        )
    return found


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page."""
    runs, asked = kept["runs"], kept["settings"]
    headings = [
        "SAE",
        "l0",
        "absorption fraction",
        "full absorption",
        "split latents",
        "F1 of best latent",
        "EV",
        "dead",
    ]
    forms = ("{:.3f}", "{:.3f}", "{:.2f}", "{:.3f}", "{:.3f}", "{:.1%}")
    rows = []
    for k in L0S:
        for form in FORMS:
            saes = [row for run in runs for row in run["saes"] if row["form"] == form and row["k"] == k]
            cells = [mean_and_range([one[key] for one in saes], text) for key, text in zip(KEYS, forms, strict=True)]
            rows.append([form, str(k), *cells])
    reliable = sum(f1 > 0.6 for f1 in runs[0]["probe_f1"].values())
    minutes = sum(run["training_seconds"] + run["measuring_seconds"] for run in runs) / 60
    return "\n".join(
        [
            *markdown_rows(headings, rows),
            "",
            *verdicts(runs),
            "",
            f"Mean over {len(runs)} seeds, range in brackets; {asked['d_sae']:,} latents, {asked['tokens']:,} training "
            f"tokens. {reliable} of {len(runs[0]['probe_f1'])} roles have a probe with F1 > 0.6; "
            f"{runs[0]['examples']['scored_on']:,} held-out examples. The study took {minutes:.0f} minutes. "
            f"{chance(len(runs))} "
            f"{made_with(kept['provenance'], RESULT)}",
        ]
    )


def main() -> None:
    """Train and measure with every seed, then write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--d-sae", type=int, default=D_SAE)
    parser.add_argument("--windows", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/absorption-study"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        about = provenance()
        runs = [run_seed(seed, asked.out, asked.tokens, asked.d_sae, asked.windows) for seed in asked.seeds]
        settings = {"tokens": asked.tokens, "d_sae": asked.d_sae, "lr": LR, "windows": asked.windows}
        write_json(asked.result, {"provenance": about, "settings": settings, "runs": runs})
    kept = json.loads(asked.result.read_text(encoding="utf-8"))
    write_marked(asked.page, START, END, markdown(kept))


if __name__ == "__main__":
    main()
