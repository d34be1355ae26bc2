"""The section of ``kronsae eval probing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.ranking import who_leads
from kronsae.report.section import Section, series_of

REVISION = 1
"""Of the kept result; see `kronsae.report.measurements`."""


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """One row per SAE; ``names`` are those of a page, whose colours they take."""
    first = next(iter(result["saes"].values()))
    headings = [
        ("latents", "d_sae"),
        ("F1, best latent", "of each concept, held-out tokens; mean over concepts"),
        ("F1, best pair", "AND or OR of two latents; mean over concepts"),
    ]
    headings += [(f"accuracy, k = {k}", "of a probe on k latents; 0.5 is chance") for k in first["mean_accuracy_by_k"]]
    headings += [
        (f"recall at {bar}", "share of the concepts whose best latent has a larger F1") for bar in result["bars"]
    ]
    headings += [
        (f"perturbation, {one['latents']}", "fall of the concept's own probe less that of the others, accuracy")
        for one in first["perturbation"]
    ]
    rows = []
    for name, one in result["saes"].items():
        figures = [one["mean_f1"], one["mean_pair_f1"], *one["mean_accuracy_by_k"].values()]
        figures += [one["recall"][0][f"recall_{bar}"] for bar in result["bars"]]
        figures += [taken["score"] for taken in one["perturbation"]]
        cells = (Cell(f"{result['d_sae'][name]:,}"), *(Cell(f"{figure:.3f}") for figure in figures))
        rows.append(TableRow(visible(name), cells, series_of(name, names)))
    return Table(tuple(headings), tuple(rows))


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """The SAEs, recall against the size of the dictionary, and the concepts."""
    result = kept["result"]
    scores = {name: [one["f1"] for one in found["concepts"]] for name, found in result["saes"].items()}
    accuracy = mean(result["probe_accuracy"].values())
    paragraphs = [
        "Which concepts do single latents tell? Every latent was tried as a detector of every concept, its threshold "
        "chosen on one part of the text and its F1 taken on another; then pairs of latents, small probes, and what "
        "happens to the probes of all concepts when one concept's latents are taken away (the error term stays).",
    ]
    if leads := who_leads(scores, figure="F1 of the best latents", over="concepts"):
        paragraphs.append(leads)
    return Section(
        key="probing",
        title="Concepts",
        paragraphs=tuple(paragraphs),
        tables=(
            ("SAE", table(result, names)),
            ("part of the dictionary", _recall(result)),
            ("concept", _concepts(result)),
        ),
        notes=(
            f"Task '{visible(str(result['task']))}': {len(result['concepts'])} concepts, "
            f"{result['tokens']['learnt_from']:,} tokens to learn from, {result['tokens']['scored_on']:,} held-out "
            f"ones. A probe on the activations themselves has accuracy {accuracy:.3f}.",
        ),
    )


def _recall(result: Mapping[str, Any]) -> Table:
    """Recall in random parts of each dictionary."""
    headings = [("latents", "in the part")]
    headings += [(f"recall at {bar}", "share of the concepts; mean over random parts") for bar in result["bars"]]
    rows = []
    for name, one in result["saes"].items():
        for number, row in enumerate(one["recall"]):
            cells = [Cell(f"{row['latents']:,.0f}")]
            cells += [Cell(f"{row[f'recall_{bar}']:.3f}") for bar in result["bars"]]
            rows.append(TableRow(f"{visible(name)}, {'whole' if number == 0 else f'1/{2**number}'}", tuple(cells)))
    return Table(tuple(headings), tuple(rows))


def _concepts(result: Mapping[str, Any]) -> Table:
    """F1 of the best latent for every concept, by SAE."""
    saes = {name: {one["name"]: one for one in found["concepts"]} for name, found in result["saes"].items()}
    headings = [("share", "of the held-out tokens"), ("probe", "accuracy of a probe on the activations themselves")]
    headings += [(visible(name), "F1 of the best latent") for name in saes]
    rows = []
    for concept in result["concepts"]:
        share = next(iter(saes.values()))[concept]["share"]
        cells = [Cell(f"{share:.1%}"), Cell(f"{result['probe_accuracy'][concept]:.3f}")]
        cells += [Cell(f"{found[concept]['f1']:.3f}") for found in saes.values()]
        rows.append(TableRow(visible(concept), tuple(cells)))
    return Table(tuple(headings), tuple(rows))
