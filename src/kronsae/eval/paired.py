"""Is one thing larger than another, measured side by side several times? One rule for every verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kronsae.errors import UserError

STANDARD_ERRORS = 2.0  # a mean difference within so many standard errors is called no difference


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of paired differences ``a - b`` with its standard error ``s / sqrt(n)``."""

    mean: float
    standard_error: float
    pairs: int

    @property
    def sign(self) -> int:
        """1 where a is larger, -1 where b is, 0 where the mean is within `STANDARD_ERRORS` standard errors of 0."""
        if abs(self.mean) <= STANDARD_ERRORS * self.standard_error:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}".replace("-", "−")


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two equally long rows of figures place by place.

    Raises:
        UserError: fewer than two pairs, which have no spread, or rows of different length.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"a difference needs two rows of at least 2 figures each; got {len(a)} and {len(b)}.")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean=statistics.mean(differences), standard_error=error, pairs=len(differences))
