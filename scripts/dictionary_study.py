"""Concepts and heads against the size of the dictionary: docs/results/dictionaries.json and two pages' tables.

.venv/bin/python scripts/dictionary_study.py [--seeds 0 1 2] [--out runs/dictionary-study] [--table-only]

TopK, KronSAE and Matryoshka of three sizes, nine SAEs a seed on one stream. Of all of them `kronsae eval probing`
(which concepts do latents tell?), of the KronSAEs `kronsae eval interaction` (do the latents of a head belong
together?). Stopped, the same command carries on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from study_parts import (
    END,
    MEASUREMENTS,
    RESULTS,
    made_with,
    markdown_rows,
    mean_and_range,
    reconstruction,
    side,
    trained,
)

from kronsae import recipes
from kronsae.architectures import matryoshka
from kronsae.files import write_json, write_marked
from kronsae.measures import interaction, probing
from kronsae.provenance import provenance
from kronsae.run_config import RunConfig
from kronsae.terminal import say
from kronsae.training.config import MemberConfig

RESULT = RESULTS / "dictionaries.json"
SIZES = (1024, 4096, 16_384)
FORMS = ("topk", "kron", "matryoshka")
K = 32
BARS = ("0.5", "0.7")


def members(seed: int) -> tuple[MemberConfig, ...]:
    """Every form at every size, each at the rate that suits its size."""
    found = []
    for d_sae in SIZES:
        common: dict[str, Any] = {"k": K, "lr": recipes.short_run_lr(d_sae), "dead_after_tokens": 100_000, "seed": seed}
        found += [
            recipes.topk(d_sae=d_sae, name=f"topk-{d_sae}", **common),
            recipes.kron(num_heads=d_sae // 8, d_base=2, d_extension=4, name=f"kron-{d_sae}", **common),
            matryoshka(d_sae=d_sae, smallest=d_sae // 8, name=f"matryoshka-{d_sae}", **common),
        ]
    return tuple(found)


def config(seed: int, tokens: int) -> RunConfig:
    """The quickstart's model, text and hook."""
    base = recipes.quickstart()
    loop = replace(base.loop, tokens=tokens, log_every=20, checkpoint_every=50)
    return replace(base, saes=members(seed), loop=loop, buffer_tokens=2**16, seed=seed)


def run_seed(seed: int, out: Path, tokens: int) -> dict[str, Any]:
    """Train nine SAEs and measure them; concepts and tokens are the same for every seed."""
    run = trained(config(seed, tokens), out / f"seed-{seed}")
    sizes = reconstruction(run)
    told = probing.measure(run, probing.ProbingSettings(), say=say)
    within = interaction.measure(run, interaction.InteractionConfig(), say=say)
    saes = []
    for name, one in told["saes"].items():
        saes.append(
            {
                "form": name.partition("-")[0],
                **sizes[name],
                **{key: one[key] for key in ("mean_f1", "mean_pair_f1", "mean_accuracy_by_k", "perturbation")},
                "recall": {bar: one["recall"][0][f"recall_{bar}"] for bar in BARS},
                "f1_by_concept": {concept["name"]: concept["f1"] for concept in one["concepts"]},
                "interaction": _in_short(within["saes"][name]) if name in within["saes"] else None,
            }
        )
    shares = {one["name"]: one["share"] for one in next(iter(told["saes"].values()))["concepts"]}
    about = {"tokens": told["tokens"], "share_by_concept": shares, "probe_accuracy": told["probe_accuracy"]}
    return {"seed": seed, "probing": about, "interaction_tokens": within["tokens"], "saes": saes}


def _in_short(found: dict[str, Any]) -> dict[str, Any]:
    """What the table and its reader need, without the quantiles and the cells of single heads."""
    short: dict[str, Any] = {
        whose: {
            which: {kind: spread["mean"] for kind, spread in found[whose][which].items()}
            for which in ("kept", "composed")
        }
        for whose in ("trained", "twin")
    }
    return short | {
        "meanings_of_a_base": found["bases"]["effective_number"]["mean"],
        "meanings_of_an_extension": found["extensions"]["effective_number"]["mean"],
        "false_positive_mass": dict(found["fidelity"]["false_positive_mass"]),
        "heads_by_living": found["living"]["heads_by_living"],
    }


def _of(runs: list[dict[str, Any]], form: str, d_sae: int) -> list[dict[str, Any]]:
    return [sae for run in runs for sae in run["saes"] if (sae["form"], sae["d_sae"]) == (form, d_sae)]


def probing_page(kept: dict[str, Any]) -> str:
    """The generated part of docs/measurements/probing.md."""
    runs = kept["runs"]
    headings = ["SAE", "latents", "encoder params", "F1, best latent", "F1, best pair", "accuracy, k = 1", "k = 5"]
    headings += [f"recall at {bar}" for bar in BARS] + ["perturbation, 10", "EV", "dead"]
    rows = []
    for form in FORMS:
        for d_sae in SIZES:
            saes = _of(runs, form, d_sae)
            figures = [[one["mean_f1"] for one in saes], [one["mean_pair_f1"] for one in saes]]
            figures += [[one["mean_accuracy_by_k"][k] for one in saes] for k in ("1", "5")]
            figures += [[one["recall"][bar] for one in saes] for bar in BARS]
            figures += [[taken["score"] for one in saes for taken in one["perturbation"] if taken["latents"] == 10]]
            figures += [[one["explained_variance"] for one in saes]]
            cells = [form, f"{d_sae:,}", f"{saes[0]['encoder_parameters']:,}", *map(mean_and_range, figures)]
            rows.append([*cells, mean_and_range([one["dead_share"] for one in saes], "{:.1%}")])
    about, tokens = runs[0]["probing"], runs[0]["probing"]["tokens"]
    shares = about["share_by_concept"].values()
    always_on = sum(2 * share / (1 + share) for share in shares) / len(shares)
    return "\n".join(
        [
            *markdown_rows(headings, rows),
            "",
            *(f"- {sentence}" for sentence in probing_verdicts(runs)),
            "",
            f"Mean over {len(runs)} seeds, range in brackets; k = {K}, {kept['settings']['tokens']:,} training tokens. "
            f"{len(about['share_by_concept'])} concepts, {tokens['learnt_from']:,} tokens to learn from, "
            f"{tokens['scored_on']:,} held-out ones; a detector that is always on has a mean F1 of {always_on:.3f}. "
            f"{made_with(kept['provenance'], RESULT)}",
        ]
    )


def probing_verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """KronSAE and Matryoshka against TopK of the same size; what a larger dictionary brings to each."""
    found = []
    for form, name in (("kron", "KronSAE"), ("matryoshka", "Matryoshka")):
        for what, key in (("F1 of the best latent", "mean_f1"), ("F1 of the best pair", "mean_pair_f1")):
            parts = []
            for d_sae in SIZES:
                pairs = zip(_of(runs, form, d_sae), _of(runs, "topk", d_sae), strict=True)
                gains = [own[key] - other[key] for own, other in pairs]
                parts.append(f"{mean_and_range(gains, '{:+.3f}')} at {d_sae:,}, {side(gains, 0, 'less', 'more')}")
            found.append(f"{name}'s {what} less TopK's: {'; '.join(parts)}.")
    for form, name in (("topk", "TopK"), ("kron", "KronSAE"), ("matryoshka", "Matryoshka")):
        small, large = SIZES[0], SIZES[-1]
        pairs = zip(_of(runs, form, large), _of(runs, form, small), strict=True)
        gains = [own["recall"]["0.5"] - other["recall"]["0.5"] for own, other in pairs]
        found.append(
            f"{name}'s recall at 0.5 changes by {mean_and_range(gains, '{:+.3f}')} from {small:,} to {large:,} "
            f"latents: {side(gains, 0, 'less', 'more')}."
        )
    return found


def interaction_page(kept: dict[str, Any]) -> str:
    """The generated part of docs/measurements/interaction.md."""
    runs = kept["runs"]
    headings = ["latents", "which", "within a head", "same base", "same extension", "neither", "between heads"]
    headings += ["twin, within", "twin, between"]
    kinds = ("within", "same_base", "same_extension", "neither", "between")
    rows = []
    for d_sae in SIZES:
        saes = [one["interaction"] for one in _of(runs, "kron", d_sae)]
        for which, word in (("kept", "kept"), ("composed", "before the sparsifier")):
            cells = [mean_and_range([one["trained"][which][kind] for one in saes]) for kind in kinds]
            cells += [mean_and_range([one["twin"][which][kind] for one in saes]) for kind in ("within", "between")]
            rows.append([f"{d_sae:,}", word, *cells])
    others = []
    for d_sae in SIZES:
        saes = [one["interaction"] for one in _of(runs, "kron", d_sae)]
        cells = [
            mean_and_range([one[key] for one in saes], "{:.2f}")
            for key in ("meanings_of_a_base", "meanings_of_an_extension")
        ]
        weak = [one["false_positive_mass"]["0.1"] for one in saes]
        alive = [one["heads_by_living"][-1] / sum(one["heads_by_living"]) for one in saes]
        others.append([f"{d_sae:,}", *cells, mean_and_range(weak, "{:.1%}"), mean_and_range(alive, "{:.1%}")])
    return "\n".join(
        [
            *markdown_rows(headings, rows),
            "",
            *markdown_rows(
                ["latents", "meanings of a base", "of an extension", "mass with a weak parent", "heads all alive"],
                others,
            ),
            "",
            *(f"- {sentence}" for sentence in interaction_verdicts(runs)),
            "",
            f"KronSAEs of M = 2, N = 4, k = {K}, {kept['settings']['tokens']:,} training tokens; "
            f"{runs[0]['interaction_tokens']:,} held-out tokens. Mean over {len(runs)} seeds, range in brackets. "
            f"{made_with(kept['provenance'], RESULT)}",
        ]
    )


def interaction_verdicts(runs: list[dict[str, Any]]) -> list[str]:
    """Figure 6's two claims: more within than between heads, and more of it after training."""
    found = []
    for which, word in (("kept", "as kept"), ("composed", "before the sparsifier")):
        for d_sae in SIZES:
            saes = [one["interaction"] for one in _of(runs, "kron", d_sae)]
            within = [one["trained"][which]["within"] for one in saes]
            beyond = [own - one["trained"][which]["between"] for own, one in zip(within, saes, strict=True)]
            risen = [own - one["twin"][which]["within"] for own, one in zip(within, saes, strict=True)]
            found.append(
                f"{d_sae:,} latents, {word}: r within a head less r between heads {mean_and_range(beyond, '{:+.3f}')}, "
                f"{side(beyond, 0, 'lower', 'higher')}; r within a head less the untrained twin's "
                f"{mean_and_range(risen, '{:+.3f}')}, {side(risen, 0, 'lower', 'higher')}."
            )
    return found


PAGES = (
    (MEASUREMENTS / "probing.md", "<!-- results:concepts -->", probing_page),
    (MEASUREMENTS / "interaction.md", "<!-- results:heads -->", interaction_page),
)


def main() -> None:
    """Train and measure seed by seed, write the result, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--out", type=Path, default=Path("runs/dictionary-study"))
    parser.add_argument("--table-only", action="store_true", help="only write the tables from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        about = provenance()
        runs = [run_seed(seed, asked.out, asked.tokens) for seed in asked.seeds]
        write_json(RESULT, {"provenance": about, "settings": {"tokens": asked.tokens, "k": K}, "runs": runs})
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    for page, start, markdown in PAGES:
        write_marked(page, start, END, markdown(kept))


if __name__ == "__main__":
    main()
