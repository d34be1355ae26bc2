"""Right and wrong answers to yes-or-no questions, and the mean of a score over latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def balanced_accuracy(*, true_positives: int, positives: int, true_negatives: int, negatives: int) -> float | None:
    """``(TPR + TNR) / 2``: 0.5 is guessing, whatever the shares; None where one of the kinds has no example."""
    if not positives or not negatives:
        return None
    return (true_positives / positives + true_negatives / negatives) / 2


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A score over latents.

    Args:
        mean: None where no latent has the score.
        std: standard deviation over latents (n - 1 in the denominator); None below two.
        n: latents that have the score.
    """

    mean: float | None
    std: float | None
    n: int


def mean_of(values: Iterable[float | None]) -> Mean:
    """The mean of the scores that are there; None is a latent without one."""
    found: Sequence[float] = [value for value in values if value is not None]
    n = len(found)
    if n == 0:
        return Mean(mean=None, std=None, n=0)
    mean = math.fsum(found) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (n - 1)) if n > 1 else None
    return Mean(mean=mean, std=std, n=n)
