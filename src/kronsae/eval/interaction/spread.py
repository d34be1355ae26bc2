"""Summary statistics of a set of values: mean, mean absolute value and quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Summary of ``number`` values; the other fields are None if there is no value.

    Args:
        number: number of values.
        mean: their mean.
        mean_abs: mean of their absolute values.
        quantiles: quantiles at `QUANTILES`; between two values, the lower one.
    """

    number: int
    mean: float | None
    mean_abs: float | None
    quantiles: tuple[float, ...] | None

    @staticmethod
    def of(values_N: Float[Tensor, " N"]) -> Spread:
        """Summarise values; none may be NaN."""
        if not len(values_N):
            return Spread(number=0, mean=None, mean_abs=None, quantiles=None)
        ordered_N = values_N.double().sort().values
        places = [int(share * (len(ordered_N) - 1)) for share in QUANTILES]
        return Spread(
            number=len(ordered_N),
            mean=significant(float(ordered_N.mean())),
            mean_abs=significant(float(ordered_N.abs().mean())),
            quantiles=tuple(significant(float(ordered_N[place])) for place in places),
        )


def significant(value: float) -> float:
    """Round to 6 significant digits; further digits depend on the summation order."""
    return float(f"{value:.6g}")


def pearson(x_N: Float[Tensor, " N"], y_N: Float[Tensor, " N"]) -> float | None:
    """Return Pearson's r over the entries where neither is NaN; None if one does not vary."""
    known_N = ~(x_N.isnan() | y_N.isnan())
    x_N, y_N = x_N[known_N].double(), y_N[known_N].double()
    if len(x_N) < 2:
        return None
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = float((x_N.square().sum() * y_N.square().sum()).sqrt())
    return significant(max(-1.0, min(1.0, float(x_N @ y_N) / scale))) if scale > 0 else None


def effective_number(mass_AB: Float[Tensor, "A B"]) -> Float[Tensor, " A"]:
    """Return ``exp(-sum_b p_b ln p_b)`` with ``p_b = mass[a, b] / sum_b mass[a, b]``; NaN for a row without mass.

    It is 1 if all mass is in one entry, and B if it is spread evenly.
    """
    p_AB = mass_AB.double() / mass_AB.double().sum(1, keepdim=True)
    entropy_A: Tensor = torch.special.entr(p_AB).sum(1)
    return entropy_A.exp()
