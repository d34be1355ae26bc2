"""Random windows of text in which a latent is active, and windows in which it is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kronsae.eval.display import TokenText
from kronsae.eval.firings import Firings, FlatText

_CHUNK = 4096
_PATIENCE = 20_000  # maximum candidates per kind; a latent that is always active may not have enough disjoint windows


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text: its tokens as strings, and whether the latent is active on each."""

    tokens: tuple[str, ...]
    active: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """Examples that a latent is explained from and scored on; no two windows share a token.

    Args:
        latent: index of the latent.
        active_tokens: number of tokens of the text on which it is active.
        explained: windows for the explanation, around places of at least the median activation.
        positives: windows for scoring, around any place where the latent is active.
        negatives: windows for scoring in which the latent is not active.
    """

    latent: int
    active_tokens: int
    explained: tuple[Example, ...]
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...]


def draw_examples(
    text: FlatText,
    firings: Firings,
    token_text: TokenText,
    *,
    explained: int,
    positives: int,
    negatives: int,
    radius: int,
    seed: int,
) -> LatentExamples:
    """Draw up to the given number of examples of each kind, deterministic given seed and text.

    Places are drawn uniformly among those that qualify, those for the explanation first. A place is skipped if its
    window overlaps one already drawn, so an explanation is never scored on the text that it was made from.
    """
    rng = np.random.default_rng([seed, firings.latent])
    taken: list[tuple[int, int]] = []
    strong = firings.places_E[firings.values_E >= np.median(firings.values_E)] if len(firings.places_E) else []
    drawn = {
        "explained": _apart(text, rng.permutation(np.asarray(strong, dtype=np.int64)), explained, radius, taken),
        "positives": _apart(text, rng.permutation(firings.places_E), positives, radius, taken),
        "negatives": _apart(text, rng.permutation(text.kept_N), negatives, radius, taken, without=firings),
    }
    return LatentExamples(
        latent=firings.latent,
        active_tokens=len(firings.places_E),
        **{
            kind: tuple(_example(text, firings, token_text, *window) for window in windows)
            for kind, windows in drawn.items()
        },
    )


def _apart(
    text: FlatText,
    places_E: Int64[np.ndarray, " E"],
    number: int,
    radius: int,
    taken: list[tuple[int, int]],
    *,
    without: Firings | None = None,
) -> list[tuple[int, int]]:
    """Return the windows of the first ``number`` places that do not overlap any in ``taken``; add them to ``taken``."""
    found: list[tuple[int, int]] = []
    for begin in range(0, min(len(places_E), _PATIENCE), _CHUNK):
        first_E, stop_E = text.around(places_E[begin : begin + _CHUNK], radius)
        silent_E = np.ones(len(first_E), dtype=bool) if without is None else without.within(first_E, stop_E) == 0
        for first, stop in zip(first_E[silent_E].tolist(), stop_E[silent_E].tolist(), strict=True):
            if len(found) == number:
                return found
            if all(stop <= other_first or other_stop <= first for other_first, other_stop in taken):
                found.append((first, stop))
                taken.append((first, stop))
    return found


def _example(text: FlatText, firings: Firings, token_text: TokenText, first: int, stop: int) -> Example:
    return Example(
        tokens=token_text.strings(text.ids_L[first:stop].tolist()),
        active=tuple(firings.active(first, stop).tolist()),
    )
