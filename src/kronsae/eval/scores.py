"""Balanced accuracy, and the mean of a score over latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def balanced_accuracy(*, true_positives: int, positives: int, true_negatives: int, negatives: int) -> float | None:
    """Return ``(TPR + TNR) / 2``; chance is 0.5 for any class balance. None if one class has no example."""
    if not positives or not negatives:
        return None
    return (true_positives / positives + true_negatives / negatives) / 2


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean and spread of a score over latents.

    Args:
        mean: mean; None if no latent has the score.
        std: standard deviation over latents (n - 1 in the denominator); None for n < 2.
        n: number of latents that have the score.
    """

    mean: float | None
    std: float | None
    n: int


def mean_of(values: Iterable[float | None]) -> Mean:
    """Return the mean of the scores that are not None."""
    found: Sequence[float] = [value for value in values if value is not None]
    n = len(found)
    if n == 0:
        return Mean(mean=None, std=None, n=0)
    mean = math.fsum(found) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (n - 1)) if n > 1 else None
    return Mean(mean=mean, std=std, n=n)
