"""The section of ``kronsae eval interaction``: structure within the heads of Kronecker encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section

REVISION = 4
"""Revision of the stored result; see `kronsae.report.measurements`."""

Figure = Callable[[Mapping[str, Any]], float | None]


def _of_pairs(whose: str, which: str, kind: str) -> Figure:
    return lambda sae: sae[whose][which][kind]["mean"]


def _at(curve: str, x: float) -> Figure:
    return lambda sae: next(y for at, y in sae["fidelity"][curve] if at == x)


def _meanings(whose: str) -> Figure:
    return lambda sae: sae[whose]["effective_number"]["mean"]


def _inherited(name: str, against: str) -> Figure:
    return lambda sae: sae["inheritance"]["r"][name][against]


_ROWS: tuple[tuple[str, Figure, str], ...] = (
    ("correlation within a head, kept", _of_pairs("trained", "kept", "within"), "{:.4f}"),
    ("… between heads", _of_pairs("trained", "kept", "between"), "{:.4f}"),
    ("… within, untrained twin", _of_pairs("twin", "kept", "within"), "{:.4f}"),
    ("… between, untrained twin", _of_pairs("twin", "kept", "between"), "{:.4f}"),
    ("correlation within a head, before the sparsifier", _of_pairs("trained", "composed", "within"), "{:.4f}"),
    ("… between heads", _of_pairs("trained", "composed", "between"), "{:.4f}"),
    ("… within, untrained twin", _of_pairs("twin", "composed", "within"), "{:.4f}"),
    ("… between, untrained twin", _of_pairs("twin", "composed", "between"), "{:.4f}"),
    ("cosine of decoder rows, same base", _of_pairs("trained", "directions", "same_base"), "{:.4f}"),
    ("… same extension", _of_pairs("trained", "directions", "same_extension"), "{:.4f}"),
    ("… no common parent", _of_pairs("trained", "directions", "neither"), "{:.4f}"),
    ("… between heads", _of_pairs("trained", "directions", "between"), "{:.4f}"),
    ("… within a head, untrained twin", _of_pairs("twin", "directions", "within"), "{:.4f}"),
    ("both parents in their top 10%", _at("both_top", 0.1), "{:.1%}"),
    ("mass with a parent not positive", _at("false_positive_mass", 0.0), "{:.1%}"),
    ("mass with a parent below 0.1 of its mean", _at("false_positive_mass", 0.1), "{:.1%}"),
    ("mass with a parent below 0.5 of its mean", _at("false_positive_mass", 0.5), "{:.1%}"),
    ("gate's output relative to equal parents", lambda sae: sae["fidelity"]["balance_mean"], "{:.3f}"),
    ("… its standard deviation", lambda sae: sae["fidelity"]["balance_deviation"], "{:.3f}"),
    ("token entropy, r with the product of the parents'", _inherited("token_entropy", "product"), "{:.2f}"),
    ("frequency, r with the product of the parents'", _inherited("frequency", "product"), "{:.2f}"),
    ("meanings of a base, effective number", _meanings("bases"), "{:.2f}"),
    ("meanings of an extension, effective number", _meanings("extensions"), "{:.2f}"),
)


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section from a stored result of `kronsae.measures.interaction`."""
    result = kept["result"]
    return Section(
        key="interaction",
        title="Interaction within heads",
        paragraphs=(
            *(_summary_sentences(name, found) for name, found in result["saes"].items()),
            *(f"{visible(name)}: {reason}" for name, reason in result["not_applicable"].items()),
        ),
        tables=(("metric", summary_table(result)),),
        notes=(
            f"Measured on {result['tokens']:,} held-out tokens, seed {kept['settings']['seed']}. "
            + " ".join(
                f"{visible(name)}: correlations, parents and gate were measured on {len(found['sampled_heads']):,} of "
                f"{found['heads']:,} heads, drawn at random. The twin was initialised with seed {found['twin_seed']}."
                for name, found in result["saes"].items()
            ),
        ),
    )


def summary_table(result: Mapping[str, Any]) -> Table:
    """Build the table with a row per metric and a column per SAE."""
    saes = result["saes"]
    headings = tuple((visible(name), f"gate {found['gate']}") for name, found in saes.items())
    rows = tuple(
        TableRow(name, tuple(_cell(figure(found), form) for found in saes.values())) for name, figure, form in _ROWS
    )
    return Table(headings, rows)


def _cell(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else form.format(value))


def _summary_sentences(name: str, found: Mapping[str, Any]) -> str:
    sentences = [f"{visible(name)} (gate {found['gate']})."]
    kept = {whose: found[whose]["kept"] for whose in ("trained", "twin")}
    within, between = kept["trained"]["within"]["mean"], kept["trained"]["between"]["mean"]
    if within is not None and between is not None:
        twin = kept["twin"]["within"]["mean"]
        before = "" if twin is None else f" In an untrained twin the mean correlation within a head is {twin:.3f}."
        sentences.append(
            f"The mean correlation of latents is {within:.3f} within a head and {between:.3f} between heads.{before}"
        )
    fidelity = found["fidelity"]
    if fidelity["activations"]:
        weak = next(y for x, y in fidelity["false_positive_mass"] if x == 0.1)
        sentences.append(
            f"{weak:.1%} of the total activation occurs where a parent is weak (at most a tenth of its own mean). A "
            "binary AND with that threshold would be 0 there."
        )
    living, cells = found["living"]["heads_by_living"], len(found["living"]["heads_by_living"]) - 1
    sentences.append(f"In {living[cells]:,} of {found['heads']:,} heads all cells are living; in {living[0]:,}, none.")
    number = found["bases"]["effective_number"]["mean"]
    if number is not None:
        sentences.append(
            f"A base's activation is spread over an effective number of {number:.1f} of {found['bases']['possible']} "
            "extensions."
        )
    return " ".join(sentences)
