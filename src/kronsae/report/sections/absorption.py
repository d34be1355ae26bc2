"""The section of ``kronsae eval absorption``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.ranking import who_leads
from kronsae.report.section import Section, series_of

REVISION = 2
"""Of the kept result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("absorption fraction", "share of a class that other latents carry, mean over words and classes; less is better"),
    ("full absorption", "share of the words that one other latent carries alone; less is better"),
    ("split latents", "latents that stand for a class, mean over classes; 1 is no splitting"),
    ("F1 of one latent", "of the first latent of a class on held-out words, mean over classes"),
)


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """One row per SAE; ``names`` are those of a page, whose colours they take."""
    keys = ("mean_absorption_fraction", "mean_full_absorption", "mean_num_split_latents", "mean_f1")
    rows = [
        TableRow(visible(name), tuple(Cell(f"{one[key]:.3f}") for key in keys), series_of(name, names))
        for name, one in result["saes"].items()
    ]
    return Table(_HEADINGS, tuple(rows))


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """One row per SAE, and the classes of each."""
    result = kept["result"]
    told = [name for name, f1 in result["probe_f1"].items() if f1 > result["min_f1"]]
    fractions = {name: [one["fraction"] for one in found["classes"]] for name, found in result["saes"].items()}
    paragraphs = [
        "A latent that stands for a class (the names of functions, the words with a certain first letter) may stay off "
        "on some words because latents of these very words have taken its part over: absorption. A linear probe says "
        "what the activation holds of the class; the latents' shares of it say who carries it.",
    ]
    if leads := who_leads(fractions, figure="absorption fraction", over="classes", less_is_better=True):
        paragraphs.append(leads)
    left_out = ", ".join(visible(name) for name in result["left_out"])
    return Section(
        key="absorption",
        title="Absorption",
        paragraphs=tuple(paragraphs),
        tables=(("SAE", table(result, names)), ("class", _classes(result))),
        notes=(
            f"Task '{visible(str(result['task']))}': {len(told)} of {len(result['classes'])} classes have a probe with "
            f"F1 above {result['min_f1']} and count; {result['examples']['learnt_from']:,} examples to learn from, "
            f"{result['examples']['scored_on']:,} held-out ones. Definitions of SAEBench."
            + (f" Left out, with too few examples: {left_out}." if left_out else ""),
        ),
    )


def _classes(result: Mapping[str, Any]) -> Table:
    """Absorption fraction of every class that counts, by SAE."""
    saes = {name: {one["name"]: one for one in found["classes"]} for name, found in result["saes"].items()}
    counted = [name for name in result["classes"] if all(name in found for found in saes.values())]
    headings = [("F1 of the probe", "on activations, held-out examples")]
    headings += [(visible(name), "absorption fraction") for name in saes]
    rows = []
    for name in counted:
        cells = [Cell(f"{result['probe_f1'][name]:.2f}")]
        cells += [Cell(f"{found[name]['fraction']:.3f}") for found in saes.values()]
        rows.append(TableRow(visible(name), tuple(cells)))
    return Table(tuple(headings), tuple(rows))
