"""The section on the statistics of all latents, bases and extensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kronsae.eval.display import visible
from kronsae.report.comparison import Cell, Table, TableRow
from kronsae.report.section import Section

REVISION = 1
"""Of the kept result; see `kronsae.report.measurements`."""

_HEADINGS = (
    ("number", "how many there are"),
    ("dead", "share that was active on none of the tokens; a base is dead if all latents it is a parent of are"),
    ("frequency", "share of the tokens on which it is active; median over the living"),
    ("activation", "mean where it is active; median over the living"),
    ("token entropy", "in nats, of how its activation falls on the tokens of the vocabulary; median over the living"),
    ("multitoken ratio", "share of a window's tokens on which it is active, where it is at all; median"),
)
_PARTS = ("latents", "bases", "extensions")


def section(kept: Mapping[str, Any], names: Sequence[str]) -> Section:
    """From a kept result of `kronsae.measures.latents`."""
    result = kept["result"]
    return Section(
        key="latents",
        title="All latents",
        paragraphs=(
            *(_in_words(name, found) for name, found in result["saes"].items()),
            "A token entropy of 0 is a latent that is active on one token of the vocabulary alone; exp of it is an "
            "effective number of tokens. Bases and extensions are taken before composition, where each is active on a "
            "good part of all tokens: their figures show how much the composition narrows.",
        ),
        tables=(("SAE", summary_table(result, names)),),
        notes=(
            f"Latents on {result['tokens']:,} held-out tokens, bases and extensions on the first "
            f"{result['pre_latent_tokens']:,}; examples from the first {result['example_tokens']:,}. "
            f"Seed {kept['settings']['seed']}.",
            *_limits(result),
        ),
    )


def summary_table(result: Mapping[str, Any], names: Sequence[str] = ()) -> Table:
    """One row for the latents of each SAE, its bases, its extensions and its heads."""
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


def _in_words(name: str, found: Mapping[str, Any]) -> str:
    summary, dead = found["summary"]["latents"], found["dead"]
    if not summary["living"]:
        return f"{visible(name)}: no latent was active."
    words = (
        f"{visible(name)}: {dead['latents']:.1%} of its latents are dead on these tokens. Of the living, half have a "
        f"token entropy below {summary['token_entropy']:.2f} nats"
    )
    if dead["bases"] is not None:
        words += (
            f"; dead are {dead['bases']:.1%} of its bases, {dead['extensions']:.1%} of its extensions and "
            f"{dead['heads']:.1%} of its heads"
        )
    return words + "."


def _limits(result: Mapping[str, Any]) -> list[str]:
    """What was measured on less than all of it."""
    found = []
    for name, sae in result["saes"].items():
        profile = sae["latents"]
        if profile["entropy_tokens"] < result["tokens"]:
            found.append(
                f"{visible(name)}: token entropy of the latents over the first {profile['entropy_tokens']:,} tokens, "
                "where the bound on memory was reached."
            )
        for part in ("bases", "extensions"):
            if sae[part] is not None and sae[part]["entropy_units"] < sae["summary"][part]["units"]:
                found.append(
                    f"{visible(name)}: token entropy of {sae[part]['entropy_units']:,} {part}, drawn at random, "
                    f"of {sae['summary'][part]['units']:,}."
                )
    return found
