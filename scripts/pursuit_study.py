"""Train TopK and KronSAEs with and without pursuit; write docs/results/pursuit.json and the tables of docs/pursuit.md.

.venv/bin/python scripts/pursuit_study.py [--seeds 0 1 2] [--rates 1 0.5 1.5] [--out runs/pursuit-study] [--table-only]

All SAEs of a run are trained on one stream. The first seed has a run for every learning rate, each a multiple of
`kronsae.runs.recipes.short_run_lr`; the other seeds have one run, in which every SAE has the rate that was best for it.
Each SAE trained without pursuit is also evaluated with one, and the ladder is climbed with those of the first seed. The
same command resumes an interrupted study. The result file is written after each run, so that a study stopped early
leaves the results of its finished runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from study_parts import END, RESULTS, ROOT, chance, made_with, markdown_rows, mean_and_range, side, trained

from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import count_parameters
from kronsae.eval.evaluation import evaluate
from kronsae.measures import ladder
from kronsae.measures.ladder import LadderConfig
from kronsae.runs import recipes
from kronsae.runs.config import RunConfig
from kronsae.runs.loaded import LoadedRun
from kronsae.runs.run import Run
from kronsae.support.config import to_dict
from kronsae.support.files import read_json, write_json, write_marked
from kronsae.support.progress import progress_bar
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say
from kronsae.training.config import MemberConfig

RESULT = RESULTS / "pursuit.json"
PAGE = ROOT / "docs" / "pursuit.md"
D_SAE, K, TOKENS = 4096, 32, 400_000
EVALUATION_TOKENS, SPLICED_TOKENS = 32_768, 16_384
ENCODERS: dict[str, tuple[str, dict[str, int]]] = {
    "topk": ("TopK", {}),
    "kron-2x4": ("KronSAE (2, 4)", {"d_base": 2, "d_extension": 4}),
    "kron-4x4": ("KronSAE (4, 4)", {"d_base": 4, "d_extension": 4}),
}
PURSUIT = Pursuit()
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pursuit": {"pursuit_rounds": PURSUIT.rounds, "pursuit_candidates": PURSUIT.candidates},  # with two losses
}
NO_PURSUIT = Pursuit(rounds=1, refit=0)
ENCODINGS: dict[str, tuple[tuple[str, Pursuit | None], ...]] = {
    "plain": (("as trained", None), ("pursuit", PURSUIT)),
    "pursuit": (("as trained", None), ("plain", NO_PURSUIT)),
}
"""How the SAEs of each training are encoded: by name, the pursuit with which; None: as trained."""
WAYS = {
    ("plain", "as trained"): "plain",
    ("plain", "pursuit"): "plain, encoded with pursuit",
    ("pursuit", "as trained"): "trained with pursuit",
    ("pursuit", "plain"): "trained with pursuit, encoded without",
}

Row = dict[str, Any]


def member_name(encoder: str, training: str) -> str:
    """Return the name of an SAE in its run."""
    return encoder if training == "plain" else f"{encoder}-{training}"


def members(seed: int, rates: Mapping[str, float]) -> tuple[MemberConfig, ...]:
    """Return each encoder with each training, with its own multiple of the quickstart's learning rate."""
    found = []
    for encoder, (_, shape) in ENCODERS.items():
        for training, options in TRAININGS.items():
            name = member_name(encoder, training)
            words: dict[str, Any] = {"d_sae": D_SAE, "k": K, "dead_after_tokens": 150_000, "seed": seed, **options}
            words |= {"name": name, "lr": rates[name] * recipes.short_run_lr(D_SAE)}
            found.append(recipes.kron(**words, **shape) if shape else recipes.topk(**words))
    return tuple(found)


def config(seed: int, rates: Mapping[str, float], tokens: int) -> RunConfig:
    """Return the run's config, with the model, text and hook of the quickstart."""
    base = recipes.quickstart()
    loop = replace(base.loop, tokens=tokens, log_every=20, checkpoint_every=50)
    whole = replace(base, saes=members(seed, rates), loop=loop, buffer_tokens=2**16, seed=seed)
    return recipes.shortened(whole, tokens)


def measure(run: Run, seed: int, rates: Mapping[str, float], tokens: int) -> list[Row]:
    """Return a row for every SAE and encoding, all on the same held-out tokens; kept in the run folder."""
    path = run.folder / "pursuit-study.json"
    settings = {"tokens": tokens, "spliced_tokens": SPLICED_TOKENS, "pursuit": to_dict(PURSUIT)}
    if path.exists() and (kept := read_json(path, "the study's results"))["settings"] == settings:
        return list(kept["rows"])
    loaded = LoadedRun(run)
    saes, about = {}, {}
    for encoder in ENCODERS:
        for training in TRAININGS:
            name = member_name(encoder, training)
            for encoding, pursuit in ENCODINGS[training]:
                sae = copy.copy(loaded.saes[name])  # shares the weights
                sae.pursuit = sae.pursuit if pursuit is None else pursuit
                saes[f"{name} {encoding}"] = sae
                about[f"{name} {encoding}"] = {
                    "seed": seed,
                    "encoder": encoder,
                    "training": training,
                    "encoding": encoding,
                    "rate": rates[name],
                    "encoder_parameters": count_parameters(sae.encoder),
                }
    say(f"Evaluating {len(saes)} ways to encode.")
    with progress_bar("evaluation") as progress:
        found = evaluate(
            saes,
            loaded.language_model,
            loaded.places[next(iter(loaded.saes))].read[0],
            loaded.make_tokens(),
            tokens=tokens,
            language_model_tokens=SPLICED_TOKENS,
            progress=progress,
        )
    rows = []
    for name, one in found.items():
        figures = one.figures()
        reconstruction, spliced = figures["reconstruction"], figures["language_model"]
        keys = ("explained_variance", "l0", "dead_share", "tokens")
        row = about[name] | {key: reconstruction[key] for key in keys}
        rows.append(row | {key: spliced[key] for key in ("ce_recovered", "kl_recovered")})
    write_json(path, {"settings": settings, "rows": rows})
    return rows


def best_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Return, for each SAE by name, the rate of largest explained variance as trained."""
    best: dict[str, Row] = {}
    for row in rows:
        name = member_name(row["encoder"], row["training"])
        if row["encoding"] == "as trained":
            best[name] = max(best.get(name, row), row, key=lambda one: float(one["explained_variance"]))
    return {name: row["rate"] for name, row in best.items()}


def climb(runs: Mapping[float, Run], rates: Mapping[str, float]) -> list[Row]:
    """Return the ladders of the first seed's plain SAEs, each at its best rate."""
    found = []
    for encoder in ENCODERS:
        run = runs[rates[encoder]]
        result = ladder.measure(run, LadderConfig(), saes=(encoder,), say=say)
        found.append({"encoder": encoder, **result["saes"][0]})
    return found


def study(asked: argparse.Namespace) -> None:
    """Train and measure every run, and write the result file after each."""
    about = provenance()
    settings = {"d_sae": D_SAE, "k": K, "tokens": asked.tokens, "pursuit": to_dict(PURSUIT)}
    settings |= {"rate_unit": recipes.short_run_lr(D_SAE), "rates": asked.rates, "pursuit_learning": "two_losses"}
    names = [member_name(encoder, training) for encoder in ENCODERS for training in TRAININGS]
    rows: list[Row] = []
    ladders: list[Row] = []
    runs: dict[float, Run] = {}

    def add(seed: int, rates: Mapping[str, float], folder: str) -> Run:
        run = trained(config(seed, rates, asked.tokens), asked.out / folder)
        rows.extend(measure(run, seed, rates, asked.evaluation_tokens))
        keep()
        return run

    def keep() -> None:
        kept = {"provenance": about, "settings": settings, "rows": rows, "ladders": ladders}
        write_json(asked.result, kept)
        write_tables(asked)

    first, *others = asked.seeds
    for rate in asked.rates:
        runs[rate] = add(first, dict.fromkeys(names, rate), f"seed-{first}-rate-{rate:g}")
    rates = best_rates(rows)
    for number, seed in enumerate(others):
        add(seed, rates, f"seed-{seed}")
        if number == 0:
            ladders += climb(runs, rates)
            keep()
    if not ladders:
        ladders += climb(runs, rates)
        keep()


def write_tables(asked: argparse.Namespace) -> None:
    """Write the tables of the page from the result file."""
    kept = json.loads(asked.result.read_text(encoding="utf-8"))
    for mark, markdown in TABLES.items():
        write_marked(asked.page, f"<!-- results:{mark} -->", END, markdown(kept))


def tuned(kept: Row) -> list[Row]:
    """Return the rows at the rate that was best for each SAE."""
    rates = best_rates(row for row in kept["rows"] if row["seed"] == kept["rows"][0]["seed"])
    return [row for row in kept["rows"] if row["rate"] == rates[member_name(row["encoder"], row["training"])]]


def of(rows: Iterable[Row], encoder: str, way: tuple[str, str], key: str = "explained_variance") -> dict[int, float]:
    """Return a figure of an encoder in one of `WAYS`, by seed."""
    return {
        row["seed"]: row[key] for row in rows if (row["encoder"], row["training"], row["encoding"]) == (encoder, *way)
    }


def differences(
    rows: Sequence[Row], encoder: str, way: tuple[str, str], key: str = "explained_variance"
) -> list[float]:
    """Return by how much a figure is above plain TopK's of the same seed."""
    own, plain = of(rows, encoder, way, key), of(rows, "topk", ("plain", "as trained"), key)
    return [own[seed] - plain[seed] for seed in own]


def codes_table(kept: Row) -> str:
    """Return the main table: every encoder in every way."""
    rows = tuned(kept)
    lines = []
    for way, words in WAYS.items():
        for encoder, (name, _) in ENCODERS.items():
            cells = [mean_and_range(differences(rows, encoder, way), "{:+.4f}")]
            if (encoder, way) == ("topk", ("plain", "as trained")):
                cells = ["–"]
            parameters = next(row["encoder_parameters"] for row in rows if row["encoder"] == encoder)
            figures = {
                key: mean_and_range(list(of(rows, encoder, way, key).values()), form)
                for key, form in (
                    ("explained_variance", "{:.4f}"),
                    ("ce_recovered", "{:.4f}"),
                    ("kl_recovered", "{:.4f}"),
                    ("dead_share", "{:.1%}"),
                    ("l0", "{:.1f}"),
                )
            }
            ev, *others = figures.values()
            lines.append([name, words, f"{parameters:,}", ev, *cells, *others])
    headings = ["SAE", "codes", "encoder parameters", "EV", "EV minus plain TopK's", "CE recovered", "KL recovered"]
    table = markdown_rows([*headings, "dead", "l0"], lines)
    return "\n".join([*table, "", *verdicts(rows), "", closing(kept, rows)])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return sentences on the differences that the page is about."""
    found = []
    for encoder, (name, _) in ENCODERS.items():
        for key, what in (("explained_variance", "EV"), ("ce_recovered", "CE recovered")):
            plain, post_hoc = (of(rows, encoder, ("plain", encoding), key) for encoding in ("as trained", "pursuit"))
            gains = [post_hoc[seed] - plain[seed] for seed in plain]
            found.append(
                f"- Encoding a plain {name} with pursuit changes its {what} by {mean_and_range(gains, '{:+.4f}')}, "
                f"{side(gains, 0, 'lower', 'higher')}."
            )
    trained_with = ("pursuit", "as trained")
    for encoder, (name, _) in ENCODERS.items():
        gaps = differences(rows, encoder, trained_with)
        found.append(
            f"- {name} trained with pursuit minus plain TopK: EV {mean_and_range(gaps, '{:+.4f}')}, "
            f"{side(gaps, 0, 'lower', 'higher')}."
        )
    other = of(rows, "topk", trained_with)
    for encoder in list(ENCODERS)[1:]:
        gaps = [value - other[seed] for seed, value in of(rows, encoder, trained_with).items()]
        found.append(
            f"- {ENCODERS[encoder][0]} minus TopK, both trained with pursuit: EV {mean_and_range(gaps, '{:+.4f}')}, "
            f"{side(gaps, 0, 'lower', 'higher')}."
        )
    return found


def closing(kept: Row, rows: Sequence[Row]) -> str:
    """Return the last paragraph: what was measured on what."""
    settings, seeds = kept["settings"], sorted({row["seed"] for row in rows})
    by_count = f"Mean over {len(seeds)} seeds, range in brackets" if len(seeds) > 1 else "One seed"
    tokens = f"{settings['tokens']:,} training tokens, {rows[0]['tokens']:,} held-out tokens"
    shape = f"{settings['d_sae']:,} latents, k = {settings['k']}"
    more = f" {chance(len(seeds))}" if len(seeds) > 1 else ""
    return f"{by_count}; {shape}, {tokens}.{more} {made_with(kept['provenance'], RESULT, 'results')}"


def rates_table(kept: Row) -> str:
    """Return the table of learning rates, tried with the first seed."""
    settings, first = kept["settings"], kept["rows"][0]["seed"]
    lines = []
    for training in TRAININGS:
        for encoder, (name, _) in ENCODERS.items():
            cells = []
            for rate in settings["rates"]:
                at = [row for row in kept["rows"] if row["seed"] == first and row["rate"] == rate]
                value = of(at, encoder, (training, "as trained")).get(first)
                cells.append("–" if value is None else f"{value:.4f}")
            lines.append([name, WAYS[training, "as trained"], *cells])
    rates = [f"{rate * settings['rate_unit']:.4f}" for rate in settings["rates"]]
    return "\n".join(
        [
            *markdown_rows(["SAE", "codes", *(f"EV at lr {rate}" for rate in rates)], lines),
            "",
            f"Seed {first}. Each SAE has the best of these rates in the other tables and seeds.",
        ]
    )


RUNGS = {
    "encoded": "as encoded",
    "one_step": "own support, one step",
    "best_values": "own support, best values",
    "pursuit": "pursuit, 2 rounds among 2k",
    "among_2k": "matching pursuit among 2k",
    "among_4k": "matching pursuit among 4k",
    "among_all": "matching pursuit among all",
}


def ladder_table(kept: Row) -> str:
    """Return the table of the ladder, and what limits each SAE."""
    if not kept["ladders"]:
        return "Not measured yet."
    names = [ENCODERS[one["encoder"]][0] for one in kept["ladders"]]
    lines = [[words, *(f"{one['ladder'][rung]:.4f}" for one in kept["ladders"])] for rung, words in RUNGS.items()]
    lost = [
        [f"lost by {part}", *(f"{one['lost_by'][part]:.4f}" for one in kept["ladders"])]
        for part in kept["ladders"][0]["lost_by"]
    ]
    tokens = statistics.mean(one["ladder"]["tokens"] for one in kept["ladders"])
    about = f"EV of the plain SAEs of seed {kept['rows'][0]['seed']} on {tokens:,.0f} held-out tokens."
    return "\n".join([*markdown_rows(["codes, at the same k", *names], [*lines, *lost]), "", about])


TABLES = {"pursuit": codes_table, "pursuit-rates": rates_table, "pursuit-ladder": ladder_table}


def main() -> None:
    """Train and measure, or only write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.5, 1.5], help="multiples of 0.7/sqrt(d_sae)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--evaluation-tokens", type=int, default=EVALUATION_TOKENS)
    parser.add_argument("--out", type=Path, default=Path("runs/pursuit-study"))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table-only", action="store_true", help="only write the tables from the result file")
    asked = parser.parse_args()
    if asked.table_only:
        write_tables(asked)
    else:
        study(asked)


if __name__ == "__main__":
    main()
