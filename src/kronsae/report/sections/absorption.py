"""The section of ``kronsae eval absorption``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.ranking import ranking_sentence
from kronsae.report.section import Section, series_of

REVISION = 3
"""Revision of the stored result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("absorption fraction", "share of a class carried by other latents, mean over words and classes; lower is better"),
    ("full absorption", "share of words whose class is carried by one other latent; lower is better"),
    ("split latents", "latents that represent a class, mean over classes; 1 is no splitting"),
    ("F1 of one latent", "F1 of the first latent of a class on held-out words, mean over classes"),
)


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """Build the table with one row per SAE; ``names`` are the page's SAEs, for their colours."""
    keys = ("mean_absorption_fraction", "mean_full_absorption", "mean_num_split_latents", "mean_f1")
    rows = [
        TableRow(visible(name), tuple(Cell(f"{one[key]:.3f}") for key in keys), series_of(name, names))
        for name, one in result["saes"].items()
    ]
    return Table(_HEADINGS, tuple(rows))


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section: one row per SAE, and the classes of each."""
    result = kept["result"]
    counted = [name for name, f1 in result["probe_f1"].items() if f1 > result["min_f1"]]
    fractions = {name: [one["fraction"] for one in found["classes"]] for name, found in result["saes"].items()}
    paragraphs = [
        "A latent that represents a class (function names, words with a given first letter) may be inactive on some "
        "words because latents specific to these words carry the class instead. This is called absorption. A linear "
        "probe measures how strongly the activation represents the class; the contribution of each latent to the "
        "probe's projection shows which latents carry it.",
    ]
    if leads := ranking_sentence(fractions, figure="absorption fraction", over="classes", less_is_better=True):
        paragraphs.append(leads)
    left_out = ", ".join(visible(name) for name in result["left_out"])
    return Section(
        key="absorption",
        title="Absorption",
        paragraphs=tuple(paragraphs),
        tables=(("SAE", table(result, names)), ("class", _classes(result))),
        notes=(
            f"Task '{visible(str(result['task']))}': {len(counted)} of {len(result['classes'])} classes have a probe "
            f"with F1 above {result['min_f1']} and are counted. {result['examples']['learnt_from']:,} training "
            f"examples, {result['examples']['scored_on']:,} held-out examples. Definitions as in SAEBench."
            + (f" Classes left out because they have too few examples: {left_out}." if left_out else ""),
        ),
    )


def _classes(result: Mapping[str, Any]) -> Table:
    """Build the table of absorption fractions of each counted class, by SAE."""
    saes = {name: {one["name"]: one for one in found["classes"]} for name, found in result["saes"].items()}
    counted = [name for name in result["classes"] if all(name in found for found in saes.values())]
    headings = [("F1 of the probe", "probe on activations, held-out examples")]
    headings += [(visible(name), "absorption fraction") for name in saes]
    rows = []
    for name in counted:
        cells = [Cell(f"{result['probe_f1'][name]:.2f}")]
        cells += [Cell(f"{found[name]['fraction']:.3f}") for found in saes.values()]
        rows.append(TableRow(visible(name), tuple(cells)))
    return Table(tuple(headings), tuple(rows))
