"""Token entropy of latents: how their activation is distributed over the vocabulary, from exact sums.

``H = -sum_i p_i ln p_i`` in nats, over the tokens i of the vocabulary, where ``p_i`` is the share of the latent's total
activation on token i (arXiv 2505.22255, appendix D). 0 means that it is active on one token only; ``ln n`` means that
it is spread evenly over n tokens. ``exp(H)`` is the effective number of tokens.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Array = np.ndarray[Any, Any]

MAX_PAIRS = 2**27  # pairs of a unit and a token: 2 GiB
BUFFER = 2**22  # entries collected before they are sorted
BLOCKS = 64  # runs are merged block by block, so that merging needs little extra memory

Run = list[tuple[Array, Array]]
"""Per block of units: keys in ascending order, and their sums."""


class PairSums:
    """Exact, sparse sums of activations by (unit, token).

    Memory: 16 bytes per distinct pair, plus `BUFFER` entries and one block. The number of pairs is bounded by ``units *
    vocabulary`` and by ``max_pairs``, independent of the number of tokens. Once there are more than ``max_pairs``
    pairs, the object is `full` and rejects further batches; its sums are exact for the batches before.

    Sums are float64. They depend on the order of the activations only through rounding.

    Args:
        units: number of units.
        vocabulary: number of tokens in the vocabulary.
        max_pairs: maximum number of pairs.
    """

    def __init__(self, units: int, vocabulary: int, max_pairs: int = MAX_PAIRS) -> None:
        self.units, self.vocabulary, self._max_pairs = units, vocabulary, max_pairs
        self.full = False
        self._borders = np.array([units * block // BLOCKS for block in range(1, BLOCKS)], dtype=np.int64) * vocabulary
        self._pending: list[tuple[Array, Array]] = []
        self._num_pending = 0
        self._runs: list[Run] = []

    @property
    def num_pairs(self) -> int:
        """Number of stored pairs; a pair in several unmerged runs counts once per run."""
        return sum(len(keys) for run in self._runs for keys, _ in run)

    def add(self, unit_E: Int[Tensor, " E"], token_E: Int[Tensor, " E"], value_E: Float[Tensor, " E"]) -> bool:
        """Add activations above 0 (CPU tensors); return False, and add nothing, once full."""
        if self.full:
            return False
        keys_E = (unit_E * self.vocabulary + token_E).numpy()
        self._pending.append((keys_E, value_E.numpy()))
        self._num_pending += len(keys_E)
        if self._num_pending >= BUFFER:
            self._sort_pending()
            if self.num_pairs > self._max_pairs:  # pairs may be counted in several runs
                self._merge_runs(0)
                self.full = self.num_pairs > self._max_pairs
        return True

    def entropies(self) -> Float[Tensor, " U"]:
        """Return the token entropy of each unit in nats, float64; NaN for units that were never active."""
        self._sort_pending()
        self._merge_runs(0)
        total_U, weighted_U = np.zeros(self.units), np.zeros(self.units)
        for keys, sums in self._runs[0] if self._runs else ():
            unit = keys // self.vocabulary
            total_U += np.bincount(unit, sums, self.units)
            weighted_U += np.bincount(unit, sums * np.log(sums), self.units)
        return _entropy(torch.from_numpy(total_U), torch.from_numpy(weighted_U))

    def _sort_pending(self) -> None:
        if not self._num_pending:
            return
        keys = np.concatenate([keys for keys, _ in self._pending])
        keys, sums = _fold(keys, np.concatenate([values for _, values in self._pending]).astype(np.float64))
        self._pending, self._num_pending = [], 0
        borders = [0, *np.searchsorted(keys, self._borders).tolist(), len(keys)]
        parts = [slice(start, stop) for start, stop in itertools.pairwise(borders)]
        self._runs.append([(keys[part].copy(), sums[part].copy()) for part in parts])
        # merging runs of similar size moves each pair a logarithmic number of times
        last = len(self._runs) - 1
        while last and _length(self._runs[last]) >= _length(self._runs[last - 1]) / 2:
            last -= 1
            self._merge_runs(last)

    def _merge_runs(self, first: int) -> None:
        """Merge the runs from index ``first`` on into one."""
        if len(self._runs) - first < 2:
            return
        merged: Run = []
        for block in range(BLOCKS):
            keys = np.concatenate([run[block][0] for run in self._runs[first:]])
            sums = np.concatenate([run[block][1] for run in self._runs[first:]])
            merged.append(_fold(keys, sums))
            for run in self._runs[first:]:
                run[block] = (keys[:0].copy(), sums[:0].copy())
        self._runs[first:] = [merged]


def dense_entropies(sums_VU: Float[Tensor, "V U"]) -> Float[Tensor, " U"]:
    """Return the token entropy of each unit (nats, float64; NaN if never active) from a dense table of sums."""
    total_U = sums_VU.sum(0, dtype=torch.float64)
    weighted_U = torch.zeros_like(total_U)
    for row_U in sums_VU:
        weighted_U += torch.special.xlogy(row_U, row_U)
    return _entropy(total_U, weighted_U)


def _entropy(total_U: Tensor, weighted_U: Tensor) -> Tensor:
    """Return ``ln S - sum_i a_i ln a_i / S``, which equals ``-sum_i p_i ln p_i`` for ``p_i = a_i / S``."""
    entropy_U = (total_U.log() - weighted_U / total_U).clamp_min(0.0)  # rounding may go below 0
    return torch.where(total_U > 0, entropy_U, math.nan)


def _length(run: Run) -> int:
    return sum(len(keys) for keys, _ in run)


def _fold(keys: Array, sums: Array) -> tuple[Array, Array]:
    """Sort by key and add up the sums of equal keys, in their original order."""
    if not len(keys):
        return keys, sums
    keys, order = _sorted(keys)
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[first], np.add.reduceat(sums[order], first)


def _sorted(keys: Array) -> tuple[Array, Array]:
    """Return the keys in ascending order and their original indices; stable.

    If key and index fit into 63 bits together, they are packed and sorted as one number: 4 million keys take 0.1 s
    instead of 1 s.
    """
    bits = int(len(keys) - 1).bit_length()
    if int(keys.max()).bit_length() + bits > 63:
        order = np.argsort(keys, kind="stable")
        return keys[order], order
    packed = np.sort((keys << bits) | np.arange(len(keys)))
    return packed >> bits, packed & ((1 << bits) - 1)
