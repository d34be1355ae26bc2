"""All activations on some tokens as one list, sorted by latent and value; the basis of all counts in this package.

Counts have the size latents x concepts; no array of tokens x latents is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kronsae.core.codes import SparseCodes

CELLS = 2**23  # entries times concepts per chunk: a few arrays of 64 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """A activations, sorted by latent and within a latent by descending value.

    Args:
        token_A, value_A: token and value of each activation.
        first_F: index of each latent's first activation; length d_sae + 1.
        tokens: number of tokens.
    """

    token_A: np.ndarray
    value_A: np.ndarray
    first_F: np.ndarray
    tokens: int

    @staticmethod
    def of(codes: SparseCodes) -> Entries:
        """Return the entries of codes ``[N, K]``."""
        token_A, k_A = (place.numpy() for place in codes.active.nonzero(as_tuple=True))
        latent_A = codes.indices.numpy()[token_A, k_A]
        value_A = codes.values.float().numpy()[token_A, k_A]
        order_A = np.lexsort((token_A, -value_A, latent_A))
        first_F = np.searchsorted(latent_A[order_A], np.arange(codes.d_sae + 1))
        return Entries(token_A=token_A[order_A], value_A=value_A[order_A], first_F=first_F, tokens=len(codes.values))

    @property
    def d_sae(self) -> int:
        """F."""
        return len(self.first_F) - 1

    def of_latent(self, latent: int) -> slice:
        """Return the slice of a latent's activations."""
        return slice(int(self.first_F[latent]), int(self.first_F[latent + 1]))

    def chunks(self, concepts: int) -> Iterator[tuple[np.ndarray, slice]]:
        """Yield chunks of latents that are active at least once, with the slice of their (contiguous) activations."""
        sizes_F = np.diff(self.first_F)
        alive = np.flatnonzero(sizes_F)
        limit = max(1, CELLS // concepts)
        start = 0
        while start < len(alive):
            ends = self.first_F[alive[start:] + 1] - self.first_F[alive[start]]
            stop = start + max(1, int(np.searchsorted(ends, limit, side="right")))
            part = alive[start:stop]
            yield part, slice(int(self.first_F[part[0]]), int(self.first_F[part[-1] + 1]))
            start = stop


@dataclass(frozen=True, kw_only=True, eq=False)
class Thresholds:
    """The best threshold of each latent for each concept on the training tokens: ``activation >= threshold``.

    ``f1_FL`` is the F1 on these tokens; a latent that is never active has F1 0 and an infinite threshold.
    """

    threshold_FL: np.ndarray
    f1_FL: np.ndarray


def best_thresholds(entries: Entries, labels_NL: np.ndarray) -> Thresholds:
    """Return the exact best thresholds: F1 = 2 tp / (predicted + positives) at each activation, largest first."""
    concepts = labels_NL.shape[1]
    f1_FL = np.zeros((entries.d_sae, concepts), dtype=np.float32)
    threshold_FL = np.full((entries.d_sae, concepts), np.inf, dtype=np.float32)
    positives_L = labels_NL.sum(0)
    for latents, place in entries.chunks(concepts):
        value_A, starts, of_latent_A = _grouped(entries, latents, place)
        tp_AL = labels_NL[entries.token_A[place]].cumsum(0, dtype=np.int32)
        before_GL = np.concatenate([np.zeros((1, concepts), dtype=np.int32), tp_AL])[starts]
        tp_AL -= before_GL[of_latent_A]
        predicted_A = np.arange(len(value_A)) - starts[of_latent_A] + 1
        score_AL = (2 * tp_AL / (predicted_A[:, None] + positives_L)).astype(np.float32)
        # a threshold includes all equal activations, so it is evaluated at the last of them
        tied_A = np.append((value_A[1:] == value_A[:-1]) & (of_latent_A[1:] == of_latent_A[:-1]), False)
        score_AL[tied_A] = -1.0
        best_GL = np.maximum.reduceat(score_AL, starts)
        number_A1 = np.arange(len(value_A))[:, None]
        at_GL = np.minimum.reduceat(np.where(score_AL == best_GL[of_latent_A], number_A1, len(value_A)), starts)
        f1_FL[latents], threshold_FL[latents] = best_GL, value_A[at_GL]
    return Thresholds(threshold_FL=threshold_FL, f1_FL=f1_FL)


def scores(entries: Entries, labels_NL: np.ndarray, threshold_FL: np.ndarray) -> np.ndarray:
    """Return F1 of each latent for each concept at given thresholds, ``[F, L]``."""
    f1_FL = np.zeros(threshold_FL.shape, dtype=np.float32)
    positives_L = labels_NL.sum(0)
    for latents, place in entries.chunks(labels_NL.shape[1]):
        value_A, starts, of_latent_A = _grouped(entries, latents, place)
        hit_AL = value_A[:, None] >= threshold_FL[latents][of_latent_A]
        predicted_GL = np.add.reduceat(hit_AL, starts, dtype=np.int32)
        tp_GL = np.add.reduceat(hit_AL & labels_NL[entries.token_A[place]], starts, dtype=np.int32)
        f1_FL[latents] = 2 * tp_GL / np.maximum(predicted_GL + positives_L, 1)
    return f1_FL


def mean_difference(entries: Entries, labels_NL: np.ndarray) -> np.ndarray:
    """Return the mean activation on tokens with a concept minus that on tokens without, ``[F, L]``."""
    positives_L = labels_NL.sum(0)
    found_FL = np.zeros((entries.d_sae, labels_NL.shape[1]), dtype=np.float32)
    for latents, place in entries.chunks(labels_NL.shape[1]):
        value_A, starts, _ = _grouped(entries, latents, place)
        with_GL = np.add.reduceat(value_A[:, None] * labels_NL[entries.token_A[place]], starts, dtype=np.float64)
        all_G1 = np.add.reduceat(value_A, starts, dtype=np.float64)[:, None]
        found_FL[latents] = with_GL / positives_L - (all_G1 - with_GL) / (entries.tokens - positives_L)
    return found_FL


def _grouped(entries: Entries, latents: np.ndarray, place: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values of a chunk, each latent's start in it, and the latent of each value."""
    starts = entries.first_F[latents] - place.start
    sizes = entries.first_F[latents + 1] - entries.first_F[latents]
    return entries.value_A[place], starts, np.repeat(np.arange(len(latents)), sizes)
