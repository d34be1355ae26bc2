"""Paired comparison of two series of measurements; the one significance rule of all comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kronsae.support.errors import UserError

LEVEL = 0.05  # significance level (false positive rate) of the two-sided t-test


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of paired differences ``a - b`` with its standard error ``s / sqrt(n)``."""

    mean: float
    standard_error: float
    pairs: int

    @property
    def sign(self) -> int:
        """1 if a is significantly larger, -1 if b is, else 0: a paired t-test at `LEVEL`."""
        return self.sign_of_several(1)

    def sign_of_several(self, tests: int) -> int:
        """Return the sign as one of several tests, each at ``LEVEL / tests`` (Bonferroni).

        With few pairs the standard error is itself uncertain: Student's t factor is 4.3 for 3 pairs, 2.0 for 60.
        """
        from scipy.stats import t

        if abs(self.mean) <= float(t.ppf(1 - LEVEL / (2 * tests), self.pairs - 1)) * self.standard_error:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}".replace("-", "−")


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two series of equal length element by element.

    Raises:
        UserError: there are fewer than two pairs, which have no standard error, or the lengths differ.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"a and b must have equal lengths of at least 2; got {len(a)} and {len(b)}.")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean=statistics.mean(differences), standard_error=error, pairs=len(differences))
