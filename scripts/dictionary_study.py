"""Run four measurements on SAEs of three sizes; write docs/results/dictionaries.json and the measurements' tables.

.venv/bin/python scripts/dictionary_study.py [--seeds 0 1 2] [--out runs/dictionary-study] [--table-only]

Each seed trains nine SAEs (TopK, KronSAE and Matryoshka) on one stream. The script runs `kronsae eval probing`,
`latents` and `token-rule` for all SAEs and `interaction` for the KronSAEs, on the same text for every seed. The same
command resumes an interrupted study.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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

from kronsae.eval.token_rule import TokenRuleConfig
from kronsae.measures import interaction, latents, probing, token_rule
from kronsae.measures.latents import LatentsConfig
from kronsae.report.measurements import kept_results
from kronsae.runs import recipes
from kronsae.runs.architectures import matryoshka
from kronsae.runs.config import RunConfig
from kronsae.runs.run import Run
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say
from kronsae.training.config import MemberConfig

RESULT = RESULTS / "dictionaries.json"
SIZES = (1024, 4096, 16_384)
FORMS = {"topk": "TopK", "kron": "KronSAE", "matryoshka": "Matryoshka"}
K, TOKENS = 32, 400_000
BARS = ("0.5", "0.7")
WEAK = "0.1"  # of the mean of a parent's positive activations

SAE = dict[str, Any]
Figure = Callable[[SAE], float | None]


def members(seed: int) -> tuple[MemberConfig, ...]:
    """Return each SAE type in each size; the learning rate depends only on the size."""
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
    """Return the run's config, with the model, text and hook of the quickstart."""
    base = recipes.quickstart()
    loop = replace(base.loop, tokens=tokens, log_every=20, checkpoint_every=50)
    return replace(base, saes=members(seed), loop=loop, buffer_tokens=2**16, seed=seed)


def run_seed(seed: int, out: Path, tokens: int) -> dict[str, Any]:
    """Train nine SAEs with one seed; return their measurements."""
    run = trained(config(seed, tokens), out / f"seed-{seed}")
    saes = {name: {"form": name.partition("-")[0], **sizes} for name, sizes in reconstruction(run).items()}
    about = {}
    for measure in (_probing, _latents, _token_rule, _interaction):
        name = measure.__name__.removeprefix("_")
        common, found = measure(run)
        about[name] = common | {"commit": _commit(run, name)}
        for sae, figures in found.items():
            saes[sae][name] = figures
    return {"seed": seed, "about": about, "saes": list(saes.values())}


def _commit(run: Run, name: str) -> str:
    """Return the commit of a measurement, which may be older than the current one because results are reused."""
    kept, _ = kept_results(run.folder)
    return str(kept[name.replace("_", "-")]["provenance"]["commit"])


Measured = tuple[dict[str, Any], dict[str, dict[str, Any]]]
"""Values common to all SAEs, and the results of each SAE."""


def _probing(run: Run) -> Measured:
    found = probing.measure(run, probing.ProbingSettings(), say=say)
    keys = ("mean_f1", "mean_pair_f1", "mean_accuracy_by_k", "perturbation")
    short = {
        name: {
            **{key: one[key] for key in keys},
            "recall": {bar: one["recall"][0][f"recall_{bar}"] for bar in BARS},
            "f1_by_concept": {concept["name"]: concept["f1"] for concept in one["concepts"]},
        }
        for name, one in found["saes"].items()
    }
    first = next(iter(found["saes"].values()))
    shares = {concept["name"]: concept["share"] for concept in first["concepts"]}
    return {"tokens": found["examples"], "share": shares, "probe_accuracy": found["probe_accuracy"]}, short


def _latents(run: Run) -> Measured:
    found = latents.measure(run, say=say)
    return {"tokens": found["tokens"]}, {name: one["summary"] for name, one in found["saes"].items()}


def _token_rule(run: Run) -> Measured:
    found = token_rule.measure(run, TokenRuleConfig(), say=say)
    short = {
        one.sae: {
            "balanced_accuracy": one.balanced_accuracy.mean,
            "auc": one.auc.mean,
            "latents": one.auc.n,
            "eligible": one.eligible,
            "living": one.living,
        }
        for one in found.saes
    }
    return {"min_active_tokens": TokenRuleConfig.min_active_tokens}, short


def _interaction(run: Run) -> Measured:
    found = interaction.measure(run, say=say)
    short = {}
    for name, one in found["saes"].items():
        r = {
            whose: {
                which: {kind: spread["mean"] for kind, spread in one[whose][which].items()}
                for which in ("kept", "composed", "directions")
            }
            for whose in ("trained", "twin")
        }
        short[name] = r | {
            "meanings_of_a_base": one["bases"]["effective_number"]["mean"],
            "meanings_of_an_extension": one["extensions"]["effective_number"]["mean"],
            "false_positive_mass": {str(at): share for at, share in one["fidelity"]["false_positive_mass"]},
            "inheritance": one["inheritance"]["r"],
            "all_alive": one["living"]["heads_by_living"][-1] / one["heads"],
        }
    return {"tokens": found["tokens"]}, short


@dataclass(frozen=True)
class Column:
    """A table column that shows one result of an SAE."""

    heading: str
    figure: Figure
    form: str = "{:.3f}"

    def cell(self, saes: Sequence[SAE]) -> str:
        """Return the cell with the mean and range over the seeds."""
        values = [self.figure(sae) for sae in saes]
        known = [value for value in values if value is not None]
        return mean_and_range(known, self.form) if len(known) == len(values) else "–"


def at(*path: Any) -> Figure:
    """Return a function that looks up a result by its keys."""

    def figure(sae: SAE) -> float | None:
        value: Any = sae
        for key in path:
            value = value[key]
        return None if value is None else float(value)

    return figure


def perturbed(latents_taken: int) -> Figure:
    """Return a function that looks up the score of targeted perturbation for a number of latents."""
    return lambda sae: next(one["score"] for one in sae["probing"]["perturbation"] if one["latents"] == latents_taken)


PROBING = (
    Column("F1, best latent", at("probing", "mean_f1")),
    Column("F1, best pair", at("probing", "mean_pair_f1")),
    Column("accuracy, k = 1", at("probing", "mean_accuracy_by_k", "1")),
    Column("k = 5", at("probing", "mean_accuracy_by_k", "5")),
    *(Column(f"recall at {bar}", at("probing", "recall", bar)) for bar in BARS),
    Column("perturbation, 10", perturbed(10)),
    Column("EV", at("explained_variance")),
    Column("dead", at("dead_share"), "{:.1%}"),
)
RULES = (
    Column("balanced accuracy", at("token_rule", "balanced_accuracy")),
    Column("AUC", at("token_rule", "auc")),
    Column("eligible latents", at("token_rule", "eligible"), "{:,.0f}"),
)
PROFILE = (
    ("frequency", "frequency", "{:.3%}"),
    ("mean activation", "mean_activation", "{:.2f}"),
    ("token entropy", "token_entropy", "{:.2f}"),
    ("multitoken ratio", "multitoken_ratio", "{:.4f}"),
)
HEADS = (
    Column("effective meanings of a base", at("interaction", "meanings_of_a_base"), "{:.2f}"),
    Column("effective meanings of an extension", at("interaction", "meanings_of_an_extension"), "{:.2f}"),
    Column(
        f"activation mass with a parent at most {WEAK} of its mean",
        at("interaction", "false_positive_mass", WEAK),
        "{:.2%}",
    ),
    Column("frequency, r with a·b", at("interaction", "inheritance", "frequency", "product")),
    Column("token entropy, r with a·b", at("interaction", "inheritance", "token_entropy", "product")),
    Column("heads without dead latents", at("interaction", "all_alive"), "{:.1%}"),
)


def of(runs: list[dict[str, Any]], form: str, d_sae: int) -> list[SAE]:
    """Return the SAEs of one type and size, in the order of the seeds."""
    return [sae for run in runs for sae in run["saes"] if (sae["form"], sae["d_sae"]) == (form, d_sae)]


def by_form_and_size(runs: list[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    """Return a table with a row for every SAE type and size."""
    rows = []
    for form in FORMS:
        for d_sae in SIZES:
            saes = of(runs, form, d_sae)
            sizes = [f"{d_sae:,}", f"{saes[0]['encoder_parameters']:,}"]
            rows.append([form, *sizes, *(column.cell(saes) for column in columns)])
    return markdown_rows(["SAE", "latents", "encoder params", *(column.heading for column in columns)], rows)


def against_topk(runs: list[dict[str, Any]], column: Column, what: str) -> list[str]:
    """Return sentences on the differences of KronSAE and Matryoshka to TopK of the same size and seed."""
    found = []
    for form in ("kron", "matryoshka"):
        parts = []
        for d_sae in SIZES:
            pairs = zip(of(runs, form, d_sae), of(runs, "topk", d_sae), strict=True)
            gains = [_known(column.figure(own)) - _known(column.figure(other)) for own, other in pairs]
            form_of_gain = column.form.replace("{:", "{:+")
            parts.append(
                f"{mean_and_range(gains, form_of_gain)} at {d_sae:,} latents, {side(gains, 0, 'lower', 'higher')}"
            )
        found.append(f"- {FORMS[form]}'s {what} minus TopK's: {'; '.join(parts)}.")
    return found


def closing(kept: dict[str, Any], measure: str, more: str) -> str:
    """Return the last paragraph of a page."""
    runs = kept["runs"]
    commits = ", ".join(sorted({run["about"][measure]["commit"] for run in runs}))
    return (
        f"Mean over {len(runs)} seeds, range in brackets; k = {K}, {kept['settings']['tokens']:,} training tokens for "
        f"every size, M = 2 and N = 4. {chance(len(runs))} {more} "
        f"{made_with(kept['provenance'] | {'commit': commits}, RESULT)}"
    )


def probing_page(kept: dict[str, Any]) -> str:
    """Return the generated part of the page on probing."""
    runs = kept["runs"]
    about = runs[0]["about"]["probing"]
    growth = []
    for form, name in FORMS.items():
        small, large = (of(runs, form, size) for size in (SIZES[0], SIZES[-1]))
        recall = at("probing", "recall", BARS[0])
        gains = [_known(recall(more)) - _known(recall(less)) for more, less in zip(large, small, strict=True)]
        growth.append(
            f"- {name}'s recall at {BARS[0]} changes by {mean_and_range(gains, '{:+.3f}')} from {SIZES[0]:,} to "
            f"{SIZES[-1]:,} latents, {side(gains, 0, 'lower', 'higher')}."
        )
    always_on = sum(2 * share / (1 + share) for share in about["share"].values()) / len(about["share"])
    more = (
        f"{len(about['share'])} concepts, {about['tokens']['learnt_from']:,} tokens for fitting and "
        f"{about['tokens']['scored_on']:,} held-out tokens for scoring. A detector that is always active has a mean F1 "
        f"of {always_on:.3f}."
    )
    verdicts = [
        *against_topk(runs, PROBING[0], "F1 of the best latent"),
        *against_topk(runs, PROBING[1], "F1 of the best pair"),
        *growth,
    ]
    return "\n".join([*by_form_and_size(runs, PROBING), "", *verdicts, "", closing(kept, "probing", more)])


def latents_page(kept: dict[str, Any]) -> str:
    """Return the generated part of the page on latents: medians over active latents, bases and extensions."""
    runs = kept["runs"]
    rows = []
    for form in FORMS:
        for d_sae in SIZES:
            saes = of(runs, form, d_sae)
            for unit in saes[0]["latents"]:
                columns = [Column(heading, at("latents", unit, key), text) for heading, key, text in PROFILE]
                rows.append([form, f"{d_sae:,}", unit, *(column.cell(saes) for column in columns)])
    table = markdown_rows(["SAE", "latents", "of", *(heading for heading, _, _ in PROFILE)], rows)
    verdicts = []
    for heading, key, text in PROFILE[2:]:
        verdicts += against_topk(runs, Column(heading, at("latents", "latents", key), text), f"median {heading}")
    more = (
        "Medians over active units. Latents are measured on "
        f"{runs[0]['about']['latents']['tokens']:,} held-out tokens, and bases and extensions on the first "
        f"{LatentsConfig().pre_latent_tokens:,} of these (complete windows)."
    )
    return "\n".join([*table, "", *verdicts, "", closing(kept, "latents", more)])


def token_rule_page(kept: dict[str, Any]) -> str:
    """Return the generated part of the page on the token rule."""
    runs = kept["runs"]
    least = runs[0]["about"]["token_rule"]["min_active_tokens"]
    more = f"100 latents per SAE and seed, sampled from those active on at least {least} tokens of both texts."
    verdicts = against_topk(runs, RULES[1], "AUC")
    return "\n".join([*by_form_and_size(runs, RULES), "", *verdicts, "", closing(kept, "token_rule", more)])


KINDS = {
    "within": "within a head",
    "same_base": "same base",
    "same_extension": "same extension",
    "neither": "neither",
    "between": "between heads",
}
PAIRS = {
    "kept": "r after the sparsifier",
    "composed": "r before the sparsifier",
    "directions": "cosine of decoder rows",
}


def of_pairs(whose: str, which: str, kind: str) -> Column:
    """Return the column with a mean over pairs of latents."""
    return Column(f"{whose}, {kind}", at("interaction", whose, which, kind))


def interaction_page(kept: dict[str, Any]) -> str:
    """Return the generated part of the page on interaction: pairs of latents, and statistics of heads."""
    runs = kept["runs"]
    rows, verdicts = [], []
    for which, word in PAIRS.items():
        columns = [of_pairs("trained", which, kind) for kind in KINDS]
        columns += [of_pairs("twin", which, kind) for kind in ("within", "between")]
        for d_sae in SIZES:
            saes = of(runs, "kron", d_sae)
            rows.append([word, f"{d_sae:,}", *(column.cell(saes) for column in columns)])
    for which, word in PAIRS.items():
        for (one, other), difference in CLAIMS[which].items():
            parts = []
            for d_sae in SIZES:
                saes = of(runs, "kron", d_sae)
                gaps = [_known(one.figure(sae)) - _known(other.figure(sae)) for sae in saes]
                parts.append(
                    f"{mean_and_range(gaps, '{:+.3f}')} at {d_sae:,} latents, {side(gaps, 0, 'lower', 'higher')}"
                )
            verdicts.append(f"- {word}, {difference}: {'; '.join(parts)}.")
    pairs = markdown_rows(["quantity", "latents", *KINDS.values(), "twin, within", "twin, between"], rows)
    heads = markdown_rows(
        ["latents", *(column.heading for column in HEADS)],
        [[f"{d_sae:,}", *(column.cell(of(runs, "kron", d_sae)) for column in HEADS)] for d_sae in SIZES],
    )
    more = (
        f"{runs[0]['about']['interaction']['tokens']:,} held-out tokens. Latents that are dead on these tokens are "
        "excluded from r after the sparsifier and from the cosine, but included in r before the sparsifier."
    )
    return "\n".join([*pairs, "", *heads, "", *verdicts, "", closing(kept, "interaction", more)])


def _claims(which: str) -> dict[tuple[Column, Column], str]:
    """Return the claims of figures 6 and 19 as differences that should be positive."""
    within = of_pairs("trained", which, "within")
    found = {(within, of_pairs("trained", which, "between")): "within a head minus between heads"}
    if which == "directions":
        bases, extensions = (of_pairs("trained", which, kind) for kind in ("same_base", "same_extension"))
        return found | {(bases, extensions): "same base minus same extension"}
    return found | {(within, of_pairs("twin", which, "within")): "within a head, trained minus twin"}


CLAIMS = {which: _claims(which) for which in PAIRS}


def _known(value: float | None) -> float:
    """Return a value that must not be None."""
    assert value is not None
    return value


PAGES = {
    "probing": probing_page,
    "latents": latents_page,
    "token-rule": token_rule_page,
    "interaction": interaction_page,
}
START = "<!-- results:dictionaries -->"


def page_path(name: str) -> Path:
    """Return the path of a measurement's page."""
    return MEASUREMENTS / f"{name}.md"


def main() -> None:
    """Train and measure with every seed, then write the result file and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("runs/dictionary-study"))
    parser.add_argument("--table-only", action="store_true", help="only write the tables from the result file")
    asked = parser.parse_args()
    if not asked.table_only:
        about = provenance()
        runs = [run_seed(seed, asked.out, asked.tokens) for seed in asked.seeds]
        write_json(RESULT, {"provenance": about, "settings": {"tokens": asked.tokens, "k": K}, "runs": runs})
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    for name, markdown in PAGES.items():
        write_marked(page_path(name), START, END, markdown(kept))


if __name__ == "__main__":
    main()
