"""The section of ``kronsae eval autointerp``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section, mean_text, series_of

REVISION = 1
"""Of the kept result; see `kronsae.report.measurements`."""

_SUMMARY = (
    (
        "detection",
        "balanced accuracy of telling active text from other text by the explanation; 0.5 is guessing",
    ),
    ("fuzzing", "balanced accuracy of telling rightly from wrongly highlighted tokens by the explanation"),
    ("latents", "latents with a detection score; of those active often enough to be drawn"),
    ("unexplained", "latents for which there is no explanation that can be read"),
    ("dropped", "prompts whose answer could not be read, or was too short or too long; they count for nothing"),
    ("failed", "prompts that were never answered"),
)
_LATENTS = (
    ("latent", "its number"),
    ("detection", "balanced accuracy, and of how many examples"),
    ("fuzzing", "balanced accuracy, and of how many examples"),
    ("explanation", "in the language model's words"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Means per SAE, then each latent with its explanation; all words that come from data are made visible."""
    config, result = kept["settings"]["config"], kept["result"]
    saes = result["saes"]
    model = visible(str(kept["settings"]["model"]["model"]))
    unanswered = sum(one["questions"] for one in result["unanswered"])
    rows = tuple(_latent_row(one, latent, names) for one in saes for latent in one["latents"])
    notes = [
        f"Model: {model}. Examples from held-out text, {2 * config['radius'] + 1} tokens each; seed {config['seed']}.",
        "± is the standard deviation over latents.",
    ]
    if unanswered:
        notes.append(f"{unanswered:,} questions were left without an answer, so the figures rest on fewer examples.")
    return Section(
        key="autointerp",
        title="Explanations by a language model",
        paragraphs=(
            f"For each of some latents drawn at random, a language model saw up to {config['explained']} examples of "
            "the latent's stronger activations and said in a sentence what it is active on. The sentence was then "
            "tested on examples it was not made from: can a reader of it tell text on which the latent is active "
            "from other text (detection), and rightly from wrongly highlighted tokens (fuzzing)?",
            " ".join(_outcome(one) for one in saes),
        ),
        tables=(
            ("SAE", Table(_SUMMARY, tuple(_summary_row(one, names) for one in saes))),
            ("SAE", Table(_LATENTS, rows)),
        ),
        notes=tuple(notes),
    )


def _outcome(one: Mapping[str, Any]) -> str:
    name, detection, fuzzing = visible(one["sae"]), one["detection"], one["fuzzing"]
    if detection["mean"] is None and fuzzing["mean"] is None:
        return f"{name}: no latent could be scored."
    return f"{name}: detection {mean_text(detection)}, fuzzing {mean_text(fuzzing)}."


def _summary_row(one: Mapping[str, Any], names: Sequence[str]) -> TableRow:
    cells = (
        Cell(mean_text(one["detection"])),
        Cell(mean_text(one["fuzzing"])),
        Cell(f"{one['detection']['n']:,} of {one['eligible']:,}"),
        Cell(f"{one['unexplained']:,}"),
        Cell(f"{one['dropped']:,}"),
        Cell(f"{one['failed']:,}"),
    )
    return TableRow(visible(one["sae"]), cells, series_of(one["sae"], names))


def _latent_row(one: Mapping[str, Any], latent: Mapping[str, Any], names: Sequence[str]) -> TableRow:
    cells = (
        Cell(str(latent["latent"])),
        Cell(_score(latent["detection"])),
        Cell(_score(latent["fuzzing"])),
        Cell(visible(latent["explanation"]) or f"({visible(latent['problem'])})"),
    )
    return TableRow(visible(one["sae"]), cells, series_of(one["sae"], names))


def _score(score: Mapping[str, Any]) -> str:
    if score["balanced_accuracy"] is None:
        return "–"
    return f"{score['balanced_accuracy']:.2f} ({score['positives'] + score['negatives']})"
