"""Pairs of latents: the best AND or OR of two latents as a detector of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kronsae.eval.probing.entries import Entries

CANDIDATES = 12  # latents with the best single-latent F1; each at its best threshold and at any activation above 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``AND`` or ``OR`` of two latents reaching their thresholds; ``f1`` is on the held-out tokens."""

    operation: Literal["and", "or"]
    latents: tuple[int, int]
    thresholds: tuple[float, float]
    f1: float

    def in_units(self, factor: float) -> Pair:
        """Return the pair for activations multiplied by ``factor``: the thresholds are multiplied too."""
        return replace(self, thresholds=(self.thresholds[0] * factor, self.thresholds[1] * factor))


@dataclass(frozen=True)
class _Columns:
    """Boolean signals, one per latent and threshold: whether each token reaches the threshold."""

    latents: np.ndarray
    thresholds: np.ndarray

    def signals(self, entries: Entries) -> np.ndarray:
        found_NC = np.zeros((entries.tokens, len(self.latents)), dtype=np.float32)
        for column, (latent, threshold) in enumerate(zip(self.latents.tolist(), self.thresholds, strict=True)):
            place = entries.of_latent(latent)
            found_NC[entries.token_A[place][entries.value_A[place] >= threshold], column] = 1.0
        return found_NC


def best_pair(
    train: Entries,
    train_true_N: np.ndarray,
    held_out: Entries,
    held_out_true_N: np.ndarray,
    f1_F: np.ndarray,
    threshold_F: np.ndarray,
) -> Pair | None:
    """Return the pair with the best F1 on the training tokens, scored on the held-out ones; None if fewer than two.

    The pair is searched among the `CANDIDATES` latents with the best single-latent F1, each at its best threshold and
    at any activation above 0.

    Args:
        f1_F, threshold_F: best F1 and threshold of each latent for this concept, on the training tokens.
    """
    alive = np.flatnonzero(f1_F > 0)
    chosen = alive[np.argsort(-f1_F[alive], kind="stable")[:CANDIDATES]]
    if len(chosen) < 2:
        return None
    smallest = np.finfo(np.float32).tiny
    columns = _Columns(np.repeat(chosen, 2), np.stack([threshold_F[chosen], np.full(len(chosen), smallest)], 1).ravel())
    signals_NC = columns.signals(train)
    scores = _pair_scores(signals_NC, train_true_N)
    scores[:, columns.latents[:, None] == columns.latents] = -1.0
    kind, one, other = np.unravel_index(int(scores.argmax()), scores.shape)
    of_pair = _Columns(columns.latents[[one, other]], columns.thresholds[[one, other]])
    f1 = _pair_scores(of_pair.signals(held_out), held_out_true_N)[kind, 0, 1]
    return Pair(
        operation="and" if kind == 0 else "or",
        latents=(int(columns.latents[one]), int(columns.latents[other])),
        thresholds=(float(columns.thresholds[one]), float(columns.thresholds[other])),
        f1=float(f1),
    )


def _pair_scores(signals_NC: np.ndarray, true_N: np.ndarray) -> np.ndarray:
    """Return F1 of the AND (index 0) and the OR (index 1) of each pair of columns, ``[2, C, C]``."""
    both_CC = signals_NC.T @ signals_NC
    both_true_CC = signals_NC[true_N].T @ signals_NC[true_N]
    number_C, true_C = np.diagonal(both_CC), np.diagonal(both_true_CC)
    positives = int(true_N.sum())
    scores = []
    for predicted, tp in (
        (both_CC, both_true_CC),
        (number_C[:, None] + number_C - both_CC, true_C[:, None] + true_C - both_true_CC),
    ):
        scores.append(2 * tp / np.maximum(predicted + positives, 1))
    return np.stack(scores)


def recall_by_size(
    train_f1_FL: np.ndarray, held_out_f1_FL: np.ndarray, *, bars: Sequence[float], draws: int, seed: int
) -> list[dict[str, float]]:
    """Return the share of concepts that have a latent above each F1 threshold, in random subsets of the dictionary.

    A concept's latent is the one in the subset with the best F1 on the training tokens; its F1 on the held-out tokens
    is compared with the thresholds ``bars``. Subsets have 1/2, 1/4, ..., 1/16 of the latents; each is the mean over
    ``draws`` subsets.

    Returns:
        Rows ``{"latents", "recall_<bar>", ...}``, the whole dictionary first.
    """
    rng = np.random.default_rng(seed)
    latents, concepts = train_f1_FL.shape
    rows = []
    for power in range(5):
        size = max(1, latents >> power)
        best_DL = np.empty((1 if power == 0 else draws, concepts))
        for draw in range(len(best_DL)):
            part = rng.permutation(latents)[:size] if power else np.arange(latents)
            chosen_L = part[train_f1_FL[part].argmax(0)]
            best_DL[draw] = held_out_f1_FL[chosen_L, np.arange(concepts)]
        shares = {f"recall_{bar}": float((best_DL > bar).mean()) for bar in bars}
        rows.append({"latents": float(size), **shares})
    return rows
