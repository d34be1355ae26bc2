"""Is one thing larger than another, measured side by side several times? One rule for every verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kronsae.support.errors import UserError

LEVEL = 0.05  # of the two-sided t-test: how often no difference at all would be called one


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of paired differences ``a - b`` with its standard error ``s / sqrt(n)``."""

    mean: float
    standard_error: float
    pairs: int

    @property
    def sign(self) -> int:
        """1 where a is larger, -1 where b is, 0 where a paired t-test at `LEVEL` finds neither."""
        return self.sign_of_several(1)

    def sign_of_several(self, tests: int) -> int:
        """The sign where this is one of several tests: each at ``LEVEL / tests``, so that all together err at `LEVEL`.

        With few pairs the standard error is itself uncertain: Student's factor is 4.3 for 3 pairs, 2.0 for 60.
        """
        from scipy.stats import t

        if abs(self.mean) <= float(t.ppf(1 - LEVEL / (2 * tests), self.pairs - 1)) * self.standard_error:
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
