"""Explain and judge latents of a run with SmolLM2; write docs/results/autointerp_smollm2.json and the page's table.

.venv/bin/python scripts/autointerp_results.py RUN [--saes topk kron] [--table-only]

The whole pipeline runs twice: with free answers, and with answers of the requested form only (`--structured`). RUN is a
run on SmolLM2, such as one of `kronsae reproduce probing --scale laptop`. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from study_parts import END, RESULTS, ROOT, markdown_rows

from kronsae.chat.local import LocalModel
from kronsae.data.model import ModelConfig, load_model, local_folder, origin
from kronsae.eval.autointerp import AutointerpConfig
from kronsae.measures.autointerp import measure
from kronsae.runs.run import open_run
from kronsae.support.config import to_dict
from kronsae.support.files import read_json, write_json, write_marked
from kronsae.support.provenance import provenance
from kronsae.support.terminal import say

RESULT = RESULTS / "autointerp_smollm2.json"
PAGE = ROOT / "docs" / "measurements" / "autointerp.md"
START = "<!-- results:autointerp -->"
JUDGE = "smollm2"
CONFIG = AutointerpConfig(latents=6, tokens=20_000, tested=16, per_prompt=4)
ANSWER_TOKENS = 100
ANSWER_SAMPLE = "such as "  # the instructions of a judgement end with it and a sample
FORMS = {"free": False, "structured": True}


def measured(folder: Path, saes: tuple[str, ...]) -> dict[str, Any]:
    """Run the pipeline with both forms of answers."""
    run, about = open_run(folder), provenance()
    loaded, files = load_model(ModelConfig(name=JUDGE)), local_folder(JUDGE)
    assert files is not None
    found: dict[str, Any] = {}
    for form, structured in FORMS.items():
        judge = LocalModel(loaded, folder=files, max_answer_tokens=ANSWER_TOKENS, structured=structured)
        result = measure(run, CONFIG, judge, saes=saes, say=say)
        assert result is not None
        found[form] = {**to_dict(result), "judgements": judgements(folder, judge.identity)}
    config = run.config
    return {
        "provenance": about,
        "judge": {"name": JUDGE, **origin(JUDGE), "max_answer_tokens": ANSWER_TOKENS},
        "config": to_dict(CONFIG),
        "run": {"model": config.model.name, "hook": config.hook, "tokens": config.loop.tokens},
        "answers": found,
    }


def judgements(folder: Path, identity: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of stored judgements of a judge, and of those that are the sample answer of their prompt."""
    count = copies = 0
    for path in (folder / "measures" / "answers").rglob("*.json"):
        kept = read_json(path, "an answer")
        asked = kept["question"]["instructions"]
        if kept["model"] == dict(identity) and ANSWER_SAMPLE in asked:
            count += 1
            copies += kept["answer"]["text"] == asked.rpartition(ANSWER_SAMPLE)[2]
    return {"count": count, "copies_of_the_sample": copies}


def _copies(found: dict[str, int], form: str) -> list[str]:
    if not found["count"]:
        return []
    return [
        f"- {form} answers: {found['copies_of_the_sample']} of {found['count']} judgements are the sample answer that "
        "the instructions show."
    ]


def markdown(kept: dict[str, Any]) -> str:
    """Return the table: a line per form of answers and SAE, and what the scores of all latents say about chance."""
    lines, pooled = [], []
    for form, result in kept["answers"].items():
        for one in result["saes"]:
            prompts = sum(latent[test]["batches"] for latent in one["latents"] for test in ("detection", "fuzzing"))
            dropped = f"{one['dropped']} of {prompts}" if prompts else "–"
            cells = [form, one["sae"], f"{one['unexplained']} of {len(one['latents'])}", dropped]
            lines.append([*cells, *(_mean(one[test]) for test in ("detection", "fuzzing"))])
        pooled += _copies(result["judgements"], form)
        for test in ("detection", "fuzzing"):
            pooled += _against_chance(result, form, test)
    about, run, judge, config = (kept[key] for key in ("provenance", "run", "judge", "config"))
    return "\n".join(
        [
            *markdown_rows(["answers", "SAE", "unexplained", "prompts dropped", "detection", "fuzzing"], lines),
            "",
            *pooled,
            "",
            f"Mean balanced accuracy ± standard deviation over latents (n); 0.5 is chance. Explained and judged by "
            f"{judge['name']} ({judge['file']}), {config['latents']} latents per SAE, {config['per_prompt']} examples "
            f"per prompt, up to {config['tested']} positive and as many negative examples per test; SAEs of "
            f"{run['model']}, {run['hook']}, {run['tokens']:,} training tokens. Measured on "
            f"{about['cores']} core(s) of {about['processor']}, commit {about['commit']} "
            f"([all figures](../results/{RESULT.name}), with all explanations; again by "
            f"`python scripts/autointerp_results.py RUN`).",
        ]
    )


def _mean(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "no score"
    spread = "" if score["std"] is None else f" ± {score['std']:.3f}"
    return f"{score['mean']:.3f}{spread} ({score['n']})"


def _against_chance(result: dict[str, Any], form: str, test: str) -> list[str]:
    """Return a sentence on the latents of all SAEs together: distance from chance in standard errors, and yes-rate."""
    latents = [latent[test] for one in result["saes"] for latent in one["latents"]]
    scores = [one["balanced_accuracy"] for one in latents if one["balanced_accuracy"] is not None]
    if len(scores) < 2:
        return [f"- {form} answers, {test}: {len(scores)} of {len(latents)} latents have a score."]
    mean, error = statistics.mean(scores), statistics.stdev(scores) / len(scores) ** 0.5
    judged = sum(one["positives"] + one["negatives"] for one in latents)
    positives = sum(one["positives"] for one in latents)
    yes = sum(one["true_positives"] + one["negatives"] - one["true_negatives"] for one in latents)
    far = "differs from chance" if abs(mean - 0.5) > 2 * error else "does not differ from chance"
    return [
        f"- {form} answers, {test}: {mean:.3f} with a standard error of {error:.3f} over {len(scores)} latents, which "
        f"{far} by more than two standard errors. The judge says yes to {yes / judged:.0%} of {judged:,} examples; "
        f"{positives / judged:.0%} are positive."
    ]


def main() -> None:
    """Measure, write the result, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--saes", nargs="+", default=["topk", "kron"])
    parser.add_argument("--table-only", action="store_true", help="only write the table from the result file")
    arguments = parser.parse_args()
    if not arguments.table_only:
        if arguments.run is None:
            parser.error("RUN must be given unless --table-only is")
        write_json(RESULT, measured(arguments.run, tuple(arguments.saes)))
    write_marked(PAGE, START, END, markdown(json.loads(RESULT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
