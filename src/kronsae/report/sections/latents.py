"""The section of ``kronsae eval latents``: statistics of all latents, bases and extensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section

REVISION = 2
"""Revision of the stored result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("number", "total number"),
    ("dead", "share that is active on none of the tokens; a base, extension or head is dead if all its latents are"),
    ("frequency", "share of tokens on which it is active; median over the living"),
    ("activation", "mean over the tokens on which it is active; median over the living"),
    ("token entropy", "entropy in nats of its activation over the vocabulary; median over the living"),
    ("multitoken ratio", "share of active tokens per window in which it is active; median over the living"),
)
_PARTS = ("latents", "bases", "extensions")


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Build the section from a stored result of `kronsae.measures.latents`."""
    result = kept["result"]
    return Section(
        key="latents",
        title="All latents",
        paragraphs=(
            *(_summary_sentence(name, found) for name, found in result["saes"].items()),
            "A latent with token entropy 0 is active on a single token of the vocabulary; exp(token entropy) is an "
            "effective number of tokens. Bases and extensions are measured before the gate, where each is active on a "
            "large share of tokens. Comparing them with the latents shows how much the composition narrows activity.",
        ),
        tables=(("SAE", summary_table(result, names)),),
        notes=(
            f"Latents were measured on {result['tokens']:,} held-out tokens, bases and extensions on the first "
            f"{result['pre_latent_tokens']:,}. Examples are from the first {result['example_tokens']:,}. "
            f"Seed {kept['settings']['seed']}.",
            *_limits(result),
        ),
    )


def summary_table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """Build the table with a row each for an SAE's latents, bases, extensions and heads."""
    order = list(names)
    rows = []
    for name, found in result["saes"].items():
        number = order.index(name) if name in order else None
        for part in _PARTS:
            if part in found["summary"]:
                cells = _cells(found["summary"][part], found["dead"][part])
                rows.append(TableRow(f"{visible(name)} {part}", cells, number))
        if found["dead"]["heads"] is not None:
            blank = tuple(Cell("–") for _ in _HEADINGS[2:])
            heads = (Cell(""), Cell(f"{found['dead']['heads']:.1%}"), *blank)
            rows.append(TableRow(f"{visible(name)} heads", heads, number))
    return Table(_HEADINGS, tuple(rows))


def _cells(summary: Mapping[str, Any], dead: float | None) -> tuple[Cell, ...]:
    return (
        Cell(f"{summary['units']:,}"),
        _cell(dead, "{:.1%}".format),
        _cell(summary["frequency"], "{:.3%}".format),
        _cell(summary["mean_activation"], "{:.3g}".format),
        _cell(summary["token_entropy"], "{:.2f}".format),
        _cell(summary["multitoken_ratio"], "{:.3f}".format),
    )


def _cell(value: float | None, text: Callable[[float], str]) -> Cell:
    return Cell("–" if value is None else text(value))


def _summary_sentence(name: str, found: Mapping[str, Any]) -> str:
    summary, dead = found["summary"]["latents"], found["dead"]
    if not summary["living"]:
        return f"{visible(name)}: no latent was active."
    words = (
        f"{visible(name)}: {dead['latents']:.1%} of the latents are dead on these tokens. The living latents have a "
        f"median token entropy of {summary['token_entropy']:.2f} nats"
    )
    if dead["bases"] is not None:
        words += (
            f". {dead['bases']:.1%} of the bases, {dead['extensions']:.1%} of the extensions and {dead['heads']:.1%} "
            "of the heads are dead"
        )
    return words + "."


def _limits(result: Mapping[str, Any]) -> list[str]:
    """Return a note for each metric that was measured on a subset of tokens or units."""
    found = []
    for name, sae in result["saes"].items():
        profile = sae["latents"]
        if profile["entropy_tokens"] < result["tokens"]:
            found.append(
                f"{visible(name)}: the token entropy of the latents is over the first {profile['entropy_tokens']:,} "
                "tokens, because the memory limit was reached."
            )
        for part in ("bases", "extensions"):
            if sae[part] is not None and sae[part]["entropy_units"] < sae["summary"][part]["units"]:
                found.append(
                    f"{visible(name)}: the token entropy of the {part} is over {sae[part]['entropy_units']:,} of "
                    f"{sae['summary'][part]['units']:,}, drawn at random."
                )
    return found
