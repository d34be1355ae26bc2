"""Positions at which selected latents are active in a text, and windows of text around positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32, Int64

from kronsae.core.codes import SparseCodes
from kronsae.eval.hooked import Windows


@dataclass(frozen=True, eq=False)
class FlatText:
    """All windows of a text, concatenated without padding. A token's index in it is its *place*.

    Args:
        ids_L: token ids, including special tokens.
        start_L, stop_L: for each place, the start and end (exclusive) of its window; no document crosses them.
        kept_N: places of the kept tokens, ascending: activation n of a pass belongs to place ``kept_N[n]``.
    """

    ids_L: Int32[np.ndarray, " L"]
    start_L: Int64[np.ndarray, " L"]
    stop_L: Int64[np.ndarray, " L"]
    kept_N: Int64[np.ndarray, " N"]

    def around(
        self, places_E: Int64[np.ndarray, " E"], radius: int
    ) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"]]:
        """Return start and end (exclusive) of ``2 radius + 1`` tokens around each place, clipped to its window."""
        return (
            np.maximum(places_E - radius, self.start_L[places_E]),
            np.minimum(places_E + radius + 1, self.stop_L[places_E]),
        )


def flat_text(windows: Iterable[Windows]) -> FlatText:
    """Concatenate the windows of a pass, in the order of the pass."""
    ids, keep, lengths = [], [], []
    for one in windows:
        mask_ST = one.attention_mask_ST
        ids.append(one.input_ids_ST[mask_ST].numpy())
        keep.append(one.keep_ST[mask_ST].numpy())
        lengths.append(mask_ST.sum(1).numpy())
    lengths_S = np.concatenate(lengths)
    stops_S = np.cumsum(lengths_S)
    return FlatText(
        ids_L=np.concatenate(ids).astype(np.int32),
        start_L=np.repeat(stops_S - lengths_S, lengths_S),
        stop_L=np.repeat(stops_S, lengths_S),
        kept_N=np.flatnonzero(np.concatenate(keep)),
    )


@dataclass(frozen=True, eq=False)
class Firings:
    """The activations of one latent: their places in a `FlatText` (ascending) and their values."""

    latent: int
    places_E: Int64[np.ndarray, " E"]
    values_E: Float32[np.ndarray, " E"]

    def within(self, first_E: Int64[np.ndarray, " Q"], stop_E: Int64[np.ndarray, " Q"]) -> Int64[np.ndarray, " Q"]:
        """Count the places in each interval ``[first, stop)``."""
        found: Int64[np.ndarray, " Q"] = np.searchsorted(self.places_E, stop_E) - np.searchsorted(
            self.places_E, first_E
        )
        return found

    def active(self, first: int, stop: int) -> Bool[np.ndarray, " W"]:
        """Return whether the latent is active at each place of ``[first, stop)``."""
        active_W = np.zeros(stop - first, dtype=bool)
        low, high = np.searchsorted(self.places_E, (first, stop))
        active_W[self.places_E[low:high] - first] = True
        return active_W


class FiringMeter:
    """Collector of the activations of selected latents over a pass; 12 bytes per activation."""

    def __init__(self, d_sae: int, latents: Sequence[int]) -> None:
        self._latents = list(latents)
        self._column_F = torch.full((d_sae,), -1)
        self._column_F[torch.tensor(self._latents, dtype=torch.int64)] = torch.arange(len(self._latents))
        self._seen = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, codes: SparseCodes) -> None:
        """Add the codes of the next kept activations."""
        values_NK = codes.values.detach().float().cpu()
        column_NK = self._column_F[codes.indices.cpu()].masked_fill(values_NK == 0, -1)
        token_E, k_E = (column_NK >= 0).nonzero(as_tuple=True)
        column_E, values_E = column_NK[token_E, k_E], values_NK[token_E, k_E]
        self._parts.append((column_E.to(torch.int32).numpy(), (token_E + self._seen).numpy(), values_E.numpy()))
        self._seen += len(values_NK)

    def value(self, text: FlatText) -> dict[int, Firings]:
        """Return the activations by latent; ``text`` must be the text of the pass."""
        if self._seen != len(text.kept_N):
            raise ValueError(f"text must have one kept token per activation; got {len(text.kept_N)} for {self._seen}.")
        column_E = np.concatenate([part[0] for part in self._parts])
        order_E = np.argsort(column_E, kind="stable")  # stable: keeps text order within a latent
        token_E = np.concatenate([part[1] for part in self._parts])[order_E]
        values_E = np.concatenate([part[2] for part in self._parts])[order_E]
        borders = np.searchsorted(column_E[order_E], np.arange(len(self._latents) + 1))
        return {
            latent: Firings(
                latent=latent,
                places_E=text.kept_N[token_E[borders[column] : borders[column + 1]]],
                values_E=values_E[borders[column] : borders[column + 1]],
            )
            for column, latent in enumerate(self._latents)
        }
