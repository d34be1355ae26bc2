"""How some numbers are spread: mean, mean size and quantiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of ``number`` values; all else is None where there is none.

    Args:
        number: how many values.
        mean: their mean.
        mean_abs: mean of their absolute values.
        quantiles: at `QUANTILES`, the nearest value below.
    """

    number: int
    mean: float | None
    mean_abs: float | None
    quantiles: tuple[float, ...] | None

    @staticmethod
    def of(values_N: Float[Tensor, " N"]) -> Spread:
        """The spread of values; none of them may be NaN."""
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
    """To 6 significant digits: below them, the order of a sum shows."""
    return float(f"{value:.6g}")


def pearson(x_N: Float[Tensor, " N"], y_N: Float[Tensor, " N"]) -> float | None:
    """Pearson's r over the places where both are known (not NaN); None where one does not vary."""
    known_N = ~(x_N.isnan() | y_N.isnan())
    x_N, y_N = x_N[known_N].double(), y_N[known_N].double()
    if len(x_N) < 2:
        return None
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = float((x_N.square().sum() * y_N.square().sum()).sqrt())
    return significant(max(-1.0, min(1.0, float(x_N @ y_N) / scale))) if scale > 0 else None


def effective_number(mass_AB: Float[Tensor, "A B"]) -> Float[Tensor, " A"]:
    """``exp(-sum_b p_b ln p_b)`` with ``p_b = mass[a, b] / sum_b mass[a, b]``; NaN where a row has no mass.

    1: all of it in one place; B: evenly spread over all.
    """
    p_AB = mass_AB.double() / mass_AB.double().sum(1, keepdim=True)
    entropy_A: Tensor = torch.special.entr(p_AB).sum(1)
    return entropy_A.exp()
