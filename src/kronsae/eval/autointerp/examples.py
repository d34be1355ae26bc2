"""Windows of text on which a latent is active, and windows on which it is not, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from kronsae.eval.display import TokenText
from kronsae.eval.firings import Firings, FlatText

_CHUNK = 4096
_PATIENCE = 20_000  # candidates looked at per kind; a latent that is always active has no windows far enough apart


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text: its tokens as text, and on which of them the latent is active."""

    tokens: tuple[str, ...]
    active: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """What a latent is explained from and tested on; no two windows share a token.

    Args:
        latent: its number.
        active_tokens: on how many tokens of the text it is active.
        explained: active, around places of at least the median activation.
        positives: active, around any place where it is.
        negatives: without any activation of the latent.
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
    """Draw up to so many of each kind, first those to explain from; the same seed and text draw the same.

    Places are drawn uniformly among those that qualify, and passed over where their window overlaps one already
    drawn: an explanation is never tested on text it was made from.
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
    """The windows of the first ``number`` places that overlap none in ``taken``, which grows by them."""
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
