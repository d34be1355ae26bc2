"""Measure the effect of the steering strength; write docs/results/steering.json and the table of docs/intervention.md.

.venv/bin/python scripts/steering_study.py [--seeds 0 1 2] [--table-only]

Active latents of a TopK SAE and a KronSAE are steered by shares of the activations' mean norm. The SAEs are those of
`scripts/dictionary_study.py`, which are trained if they do not exist. The study measures how many continuations change,
and how many distinct tokens they contain, which is low for repetitive text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import dictionary_study
import torch
from study_parts import END, EV_TOKENS, RESULTS, ROOT, made_with, markdown_rows, mean_and_range, trained

from kronsae.data.tokens import special_frame
from kronsae.interventions.intervene import Intervention, steer
from kronsae.interventions.steering import STRENGTH, continuations, mean_activation_norm
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run
from kronsae.support.files import read_json, write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say

RESULT = RESULTS / "steering.json"
PAGE = ROOT / "docs" / "intervention.md"
START = "<!-- results:steering -->"
STRENGTHS = (0.1, STRENGTH, 0.5, 1.0)
SAES = ("topk-4096", "kron-4096")
PROMPTS = ("def main(", "import os\n", "class Reader:\n    def ", "    for name in ")
LATENTS, NEW_TOKENS = 12, 20


def run_seed(seed: int, out: Path) -> list[dict[str, Any]]:
    """Return the results of one seed: every SAE at every strength."""
    run = trained(dictionary_study.config(seed, dictionary_study.TOKENS), out / f"seed-{seed}")
    run.compare(EV_TOKENS)  # writes which latents are active
    loaded = LoadedRun(run)
    norm = mean_activation_norm(loaded.source, run.config.hook)
    return [
        {
            "seed": seed,
            "sae": name,
            "strength": strength,
            "norm": norm,
            **steered(loaded, name, strength * norm, seed),
        }
        for name in SAES
        for strength in STRENGTHS
    ]


def steered(loaded: LoadedRun, name: str, amount: float, seed: int) -> dict[str, float]:
    """Return the share of changed texts, and the share of distinct tokens with and without steering."""
    model, sae = loaded.language_model, loaded.saes[name]
    after_prefix = slice(len(special_frame(model.tokenizer)[0]), None)
    changed, different, plain = [], [], []
    for latent in living(loaded.run, name, seed):
        change = steer(latent, amount / float(sae.W_dec[latent].detach().norm()))
        site = Intervention(sae=sae, hook=loaded.run.config.hook, changes=[change], positions=after_prefix)
        for one in continuations(model, PROMPTS, site, new_tokens=NEW_TOKENS):
            changed.append(one.plain != one.changed)
            different.append(share_of_different(model.tokenizer, one.changed))
            plain.append(share_of_different(model.tokenizer, one.plain))
    return {name: sum(of) / len(of) for name, of in (("changed", changed), ("different", different), ("plain", plain))}


def living(run: Run, name: str, seed: int) -> list[int]:
    """Return random latents among those that are active on held-out text."""
    counts = read_json(run.folder / "latents.json", "the evaluation's latents")[name]["statistics"]["active_tokens"]
    alive = [latent for latent, count in enumerate(counts) if count]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:LATENTS]
    return [alive[place] for place in order.tolist()]


def share_of_different(tokenizer: Any, text: str) -> float:
    """Return the number of distinct tokens over that of all tokens; it is near 0 for repetitive text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(set(ids)) / len(ids) if ids else 1.0


def markdown(kept: dict[str, Any]) -> str:
    """Return the generated part of the page."""
    rows, seeds = kept["rows"], sorted({row["seed"] for row in kept["rows"]})
    lines = []
    for name in SAES:
        for strength in STRENGTHS:
            of = [row for row in rows if (row["sae"], row["strength"]) == (name, strength)]
            cells = [mean_and_range([row[key] for row in of], "{:.0%}") for key in ("changed", "different")]
            lines.append([name.partition("-")[0], f"{strength:g}", *cells])
    plain = mean_and_range([row["plain"] for row in rows if row["strength"] == STRENGTHS[0]], "{:.0%}")
    return "\n".join(
        [
            *markdown_rows(["SAE", "strength", "changed texts", "distinct tokens of a text"], lines),
            "",
            f"Mean over {len(seeds)} seeds, range in brackets; {LATENTS} active latents out of 4,096, {len(PROMPTS)} "
            f"prompts and {NEW_TOKENS} new tokens. Without steering, {plain} of a text's tokens are distinct. "
            f"{made_with(kept['provenance'], RESULT, 'results')}",
        ]
    )


def main() -> None:
    """Run the study for every seed, then write the result file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/dictionary-study"))
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        about, rows = provenance(), []
        for seed in asked.seeds:
            rows += run_seed(seed, asked.out)
            say(f"Seed {seed} is done.")
        write_json(RESULT, {"provenance": about, "rows": rows})
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
