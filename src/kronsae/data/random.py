"""Create random generators and permutations that depend only on a seed and a purpose, not on earlier draws."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ROUNDS = 8
SMALL = 4096
"""Up to this length a permutation is drawn whole: the network is not uniform for a handful of elements."""
# A key of 8 bytes per round: 64 bytes, the longest digest of BLAKE2b.
_KEY_BYTES = 8
# Increment and multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def generator_for(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Return a generator for a purpose and, within a series, for a number.

    The arguments are hashed to a 32-bit seed of the generator. Two generators have the same seed with a probability of
    2^-32.
    """
    words = [seed, number, *purpose.encode()]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def permutation(count: int, seed: int, purpose: str, *numbers: int) -> Tensor:
    """Return a random permutation of ``range(count)`` that depends only on the arguments."""
    digest = _digest(seed, purpose, numbers, size=7)
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(count, generator=generator)


class LazyPermutation:
    """Pseudo-random permutation of ``range(count)``, any part of which can be computed alone in constant memory.

    It is a Feistel network on a grid with ``ceil(sqrt(count))`` rows and the smallest sufficient number of columns. A
    round adds a keyed hash of the column to the row, and the next round a keyed hash of the row to the column; each
    round is a bijection. A result that is not below ``count`` is permuted again until it is (cycle walking), which
    preserves the bijection. Up to `SMALL` elements, `permutation` is used instead. Source: Black and Rogaway, "Ciphers
    with arbitrary finite domains" (2002), method 3.

    Args:
        count: Length of the permutation, at least 1.
        seed: Seed of the permutation.
        purpose: Use of the permutation; different purposes have independent permutations.
        numbers: Index of the permutation within a series, such as the epoch.

    Example:
        >>> order = LazyPermutation(10, 0, "example")
        >>> sorted([*order.part(0, 4), *order.part(4, 10)]) == list(range(10))
        True
    """

    def __init__(self, count: int, seed: int, purpose: str, *numbers: int) -> None:
        self.count = count
        self._whole = permutation(count, seed, purpose, *numbers).numpy() if count <= SMALL else None
        self._rows = np.uint64(math.isqrt(count - 1) + 1)
        self._columns = np.uint64(-(-count // int(self._rows)))
        self._keys = np.frombuffer(_digest(seed, purpose, numbers, size=_KEY_BYTES * _ROUNDS), dtype="<u8")

    def part(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the elements ``start`` to ``stop - 1`` of the permutation."""
        if self._whole is not None:
            return self._whole[start:stop].astype(np.int64)
        found = self._permute(np.arange(start, stop, dtype=np.uint64))
        while (outside := found >= self.count).any():
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        row, column = np.divmod(numbers, self._columns)
        for turn, key in enumerate(self._keys):
            if turn % 2 == 0:
                row = (row + _hash(column, key)) % self._rows
            else:
                column = (column + _hash(row, key)) % self._columns
        return row * self._columns + column


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Return the upper 32 bits of SplitMix64, so that adding them to a row or column cannot overflow."""
    mixed = values * _INCREMENT + key
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * multiplier
    return mixed >> np.uint64(32)


def _digest(seed: int, purpose: str, numbers: tuple[int, ...], *, size: int) -> bytes:
    return hashlib.blake2b(repr((seed, purpose, *numbers)).encode(), digest_size=size).digest()
