"""All active latents of some tokens as one list, by latent and activation: what every count here is made from.

Counts are kept for latents x concepts, never for tokens x latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kronsae.core.codes import SparseCodes

CELLS = 2**23  # entries times concepts looked at together: a few arrays of 64 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """A activations, latent by latent and within a latent the largest first.

    Args:
        token_A, value_A: the token each is of, and how large it is.
        first_F: where a latent's activations begin; one longer than d_sae.
        tokens: how many tokens they are of.
    """

    token_A: np.ndarray
    value_A: np.ndarray
    first_F: np.ndarray
    tokens: int

    @staticmethod
    def of(codes: SparseCodes) -> Entries:
        """The active latents of codes ``[N, K]``."""
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
        """Where a latent's activations are."""
        return slice(int(self.first_F[latent]), int(self.first_F[latent + 1]))

    def chunks(self, concepts: int) -> Iterator[tuple[np.ndarray, slice]]:
        """Latents that are active at all, some at a time, and where their activations are (they lie together)."""
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
    """For every latent and concept the best threshold on the tokens learnt from: ``active >= threshold``.

    ``f1_FL`` is its F1 there; a latent that is never active has F1 0 and an infinite threshold.
    """

    threshold_FL: np.ndarray
    f1_FL: np.ndarray


def best_thresholds(entries: Entries, labels_NL: np.ndarray) -> Thresholds:
    """Over all thresholds, exactly: F1 = 2 tp / (predicted + positives) after each activation, largest first."""
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
        # a threshold takes all equal activations in: it stands at the last of them
        tied_A = np.append((value_A[1:] == value_A[:-1]) & (of_latent_A[1:] == of_latent_A[:-1]), False)
        score_AL[tied_A] = -1.0
        best_GL = np.maximum.reduceat(score_AL, starts)
        number_A1 = np.arange(len(value_A))[:, None]
        at_GL = np.minimum.reduceat(np.where(score_AL == best_GL[of_latent_A], number_A1, len(value_A)), starts)
        f1_FL[latents], threshold_FL[latents] = best_GL, value_A[at_GL]
    return Thresholds(threshold_FL=threshold_FL, f1_FL=f1_FL)


def scores(entries: Entries, labels_NL: np.ndarray, threshold_FL: np.ndarray) -> np.ndarray:
    """F1 of every latent and concept at given thresholds, ``[F, L]``."""
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
    """Mean activation on the tokens with a concept minus that on those without, ``[F, L]``."""
    positives_L = labels_NL.sum(0)
    found_FL = np.zeros((entries.d_sae, labels_NL.shape[1]), dtype=np.float32)
    for latents, place in entries.chunks(labels_NL.shape[1]):
        value_A, starts, _ = _grouped(entries, latents, place)
        with_GL = np.add.reduceat(value_A[:, None] * labels_NL[entries.token_A[place]], starts, dtype=np.float64)
        all_G1 = np.add.reduceat(value_A, starts, dtype=np.float64)[:, None]
        found_FL[latents] = with_GL / positives_L - (all_G1 - with_GL) / (entries.tokens - positives_L)
    return found_FL


def _grouped(entries: Entries, latents: np.ndarray, place: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of a chunk, where each latent begins in it, and which of the latents each value is of."""
    starts = entries.first_F[latents] - place.start
    sizes = entries.first_F[latents + 1] - entries.first_F[latents]
    return entries.value_A[place], starts, np.repeat(np.arange(len(latents)), sizes)
