"""The section of ``kronsae eval autointerp``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section, mean_text, series_of

REVISION = 2
"""Revision of the stored result; see `kronsae.report.measurements`."""

_SUMMARY = (
    (
        "detection",
        "balanced accuracy of distinguishing active from inactive text by the explanation; chance is 0.5",
    ),
    ("fuzzing", "balanced accuracy of distinguishing correct from incorrect highlights by the explanation"),
    ("latents", "latents with a detection score, of those active often enough to be drawn"),
    ("unexplained", "latents without a readable explanation"),
    ("dropped", "prompts whose answer was unreadable, too short or too long; they are not scored"),
    ("failed", "prompts without an answer"),
)
_LATENTS = (
    ("latent", "its number"),
    ("detection", "balanced accuracy (number of examples)"),
    ("fuzzing", "balanced accuracy (number of examples)"),
    ("explanation", "the language model's explanation"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section: means per SAE, then each latent with its explanation. Text from data is made visible."""
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
        notes.append(f"{unanswered:,} prompts have no answer, so the scores are based on fewer examples.")
    return Section(
        key="autointerp",
        title="Explanations by a language model",
        paragraphs=(
            f"For each of several random latents, a language model saw up to {config['explained']} examples of the "
            "latent's stronger activations and explained in one sentence what it is active on. The explanation was "
            "then scored on other examples: can a language model use it to distinguish text on which the latent is "
            "active from other text (detection), and correctly from incorrectly highlighted tokens (fuzzing)?",
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
