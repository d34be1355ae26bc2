"""The section of ``kronsae eval probing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.ranking import ranking_sentence
from kronsae.report.section import Section, series_of

REVISION = 3
"""Revision of the stored result; see `kronsae.report.measurements`."""


def table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """Build the table with one row per SAE; ``names`` are the page's SAEs, for their colours."""
    first = next(iter(result["saes"].values()))
    headings = [
        ("latents", "d_sae"),
        ("F1, best latent", "best latent of each concept, held-out text; mean over concepts"),
        ("F1, best pair", "AND or OR of two latents; mean over concepts"),
    ]
    headings += [(f"accuracy, k = {k}", "probe on k latents; chance is 0.5") for k in first["mean_accuracy_by_k"]]
    headings += [(f"recall at {bar}", "share of concepts whose best latent has a larger F1") for bar in result["bars"]]
    headings += [
        (f"perturbation, {one['latents']}", "decrease in accuracy of the concept's own probe minus that of the others")
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
    """Build the section: SAEs, recall by dictionary size, and concepts."""
    result = kept["result"]
    scores = {name: [one["f1"] for one in found["concepts"]] for name, found in result["saes"].items()}
    accuracy = mean(result["probe_accuracy"].values())
    paragraphs = [
        "Which concepts do single latents detect? Each latent was tested as a detector of each concept: the threshold "
        "was chosen on training text, and F1 was measured on held-out text. The table also has pairs of latents, "
        "k-sparse probes, and targeted perturbation: the change in the probes of all concepts when the latents of one "
        "concept are ablated (the error term is kept).",
    ]
    if leads := ranking_sentence(scores, figure="F1 of the best latents", over="concepts"):
        paragraphs.append(leads)
    return Section(
        key="probing",
        title="Concepts",
        paragraphs=tuple(paragraphs),
        tables=(
            ("SAE", table(result, names)),
            ("dictionary subset", _recall(result)),
            ("concept", _concepts(result)),
        ),
        notes=(
            f"Task '{visible(str(result['task']))}': {len(result['concepts'])} concepts, "
            f"{result['examples']['learnt_from']:,} training {result['per']}s, {result['examples']['scored_on']:,} "
            f"held-out {result['per']}s{'' if result['per'] == 'token' else ', each with the means over its tokens'}. "
            f"A probe on the activations themselves has accuracy {accuracy:.3f}.",
        ),
    )


def _recall(result: Mapping[str, Any]) -> Table:
    """Build the table of recall in random subsets of each dictionary."""
    headings = [("latents", "in the subset")]
    headings += [(f"recall at {bar}", "share of concepts; mean over random subsets") for bar in result["bars"]]
    rows = []
    for name, one in result["saes"].items():
        for number, row in enumerate(one["recall"]):
            cells = [Cell(f"{row['latents']:,.0f}")]
            cells += [Cell(f"{row[f'recall_{bar}']:.3f}") for bar in result["bars"]]
            rows.append(TableRow(f"{visible(name)}, {'whole' if number == 0 else f'1/{2**number}'}", tuple(cells)))
    return Table(tuple(headings), tuple(rows))


def _concepts(result: Mapping[str, Any]) -> Table:
    """Build the table of the best latent's F1 for each concept, by SAE."""
    saes = {name: {one["name"]: one for one in found["concepts"]} for name, found in result["saes"].items()}
    headings = [
        ("share", f"share of held-out {result['per']}s"),
        ("probe", "accuracy of a probe on the activations themselves"),
    ]
    headings += [(visible(name), "F1 of the best latent") for name in saes]
    rows = []
    for concept in result["concepts"]:
        share = next(iter(saes.values()))[concept]["share"]
        cells = [Cell(f"{share:.1%}"), Cell(f"{result['probe_accuracy'][concept]:.3f}")]
        cells += [Cell(f"{found[concept]['f1']:.3f}") for found in saes.values()]
        rows.append(TableRow(visible(concept), tuple(cells)))
    return Table(tuple(headings), tuple(rows))
