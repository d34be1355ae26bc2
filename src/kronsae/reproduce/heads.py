"""What four studies share: KronSAEs of two shapes and what `kronsae.measures.interaction` says of their heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kronsae.measures.interaction import InteractionConfig, measure
from kronsae.reproduce.claims import Row
from kronsae.reproduce.context import Context
from kronsae.reproduce.tables import Column
from kronsae.support.progress import progress_bar

SHAPES = ((2, 4), (4, 2))
KEYS = (Column("M", "d_base", "{}"), Column("N", "d_extension", "{}"))


def measured_heads(context: Context, figures: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> list[Row]:
    """Train the KronSAEs and return their rows with the figures that a study takes from each `Interaction`."""
    specs = [f"{context.sae('kron', d_base=m, d_extension=n)} name=kron-{m}x{n}" for m, n in SHAPES]
    found: list[Row] = []
    for run, saes in context.runs(context.train(specs)):
        with progress_bar("interaction", quiet=context.quiet) as progress:
            result = measure(
                run, InteractionConfig(tokens=context.scale.eval_tokens), say=context.say, progress=progress
            )
        found += [{**row, **figures(result["saes"][name])} for name, row in saes.items()]
    return found


def pairs(interaction: Mapping[str, Any], which: str) -> dict[str, float | None]:
    """Return the means over pairs of one similarity, as ``trained_within``, ``twin_between``, ...

    Args:
        interaction: an `Interaction` as JSON values.
        which: ``kept``, ``composed`` or ``directions``, see `kronsae.measures.interaction.Pairs`.
    """
    return {
        f"{which}_{whose}_{kind}": spread["mean"]
        for whose in ("trained", "twin")
        for kind, spread in interaction[whose][which].items()
    }
