"""Pursuit in plain PyTorch, of all tokens of a batch at once: the portable path, head parallel and autograd share it.

`kronsae.core.pursuit` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad as pad_columns

from kronsae.kernels.selection import Pursued, PursuitRounds


class Rows(NamedTuple):
    """Some rows of the dictionary for each token, wherever they are: all that a pursuit asks of them."""

    products: Callable[[Float[Tensor, "B D"]], Float[Tensor, "B C"]]
    """``<d_c, e>`` for each row."""
    combine: Callable[[Float[Tensor, "B C"]], Float[Tensor, "B D"]]
    """``sum_c z_c d_c``."""


def pursue_by(
    dictionary: Rows,
    inverse_BC: Float[Tensor, "B C"],
    target_BD: Float[Tensor, "B D"],
    values_BC: Float[Tensor, "B C"],
    latents_BC: Int[Tensor, "B C"],
    rounds: PursuitRounds,
) -> Pursued:
    """A pursuit that sees the dictionary only through the products and sums of its rows.

    Args:
        dictionary: the rows of the candidates.
        inverse_BC: ``1 / |d_c|``.
        target_BD, values_BC, latents_BC, rounds: as for `pursue`.
    """
    by_latent_BC = latents_BC.argsort(dim=1)  # of equal worth the smaller latent comes first
    left_BC, chosen_BC = values_BC > 0, torch.zeros_like(values_BC, dtype=torch.bool)
    z_BC, worth_BC = torch.zeros_like(values_BC), values_BC
    columns = []
    for number, size in enumerate(rounds.sizes):
        if number > 0:
            worth_BC = dictionary.products(target_BD - dictionary.combine(z_BC)) * inverse_BC
        worth_BC = torch.where(left_BC & (worth_BC > 0), worth_BC, 0.0)
        order_BC = worth_BC.gather(1, by_latent_BC).sort(dim=1, stable=True, descending=True).indices
        places_BK = by_latent_BC.gather(1, order_BC[:, :size])
        taken_BC = torch.zeros_like(chosen_BC).scatter_(1, places_BK, True) & (worth_BC > 0)
        start_BC = values_BC if number == 0 else rounds.start * worth_BC * inverse_BC
        z_BC = torch.where(taken_BC, start_BC, z_BC)
        left_BC, chosen_BC = left_BC & ~taken_BC, chosen_BC | taken_BC
        columns.append(_listed_places(taken_BC, size))
        z_BC = refit_by(dictionary, inverse_BC, target_BD, z_BC, chosen_BC, rounds.steps[number])
    places_BK = torch.cat(columns, dim=1)
    is_chosen_BK, at_BK = places_BK >= 0, places_BK.clamp_min(0)
    values_BK = torch.where(is_chosen_BK, z_BC.gather(1, at_BK), 0.0)
    values_BK = values_BK.masked_fill(~values_BC.isfinite().all(1, keepdim=True), torch.nan)
    is_chosen_BK &= ~values_BK.isnan()
    return Pursued(values_BK, latents_BC.gather(1, at_BK).where(is_chosen_BK, 0), places_BK.where(is_chosen_BK, -1))


def refit_by(
    dictionary: Rows,
    inverse_BC: Float[Tensor, "B C"],
    target_BD: Float[Tensor, "B D"],
    z_BC: Float[Tensor, "B C"],
    chosen_BC: Bool[Tensor, "B C"],
    steps: int,
) -> Float[Tensor, "B C"]:
    """The values after some steps of projected conjugate gradients on those of the chosen; differentiable.

    Lengths are those of unit rows: ``g_c = <d_c, e> / |d_c|`` with ``e = target - sum_c z_c d_c``, 0 where a value of 0
    would fall. The direction is ``s = g + max(0, <g, g - g'> / <g', g'>) s'`` with g' and s' of the step before (Polak
    and Ribiere), and g at first. How far to go is exact: what makes ``|e|`` smallest on this line. Where this leads
    below 0, the values there become 0, the line to the values thus reached is gone along as far as ``|e|`` falls, and
    the next direction is g again: no step raises ``|e|``.
    """
    last_BC = previous_BC = torch.zeros_like(z_BC)
    residual_BD = target_BD - dictionary.combine(z_BC) if steps else target_BD
    for step in range(steps):
        grad_BC = dictionary.products(residual_BD) * inverse_BC
        free_BC = chosen_BC & ((z_BC > 0) | (grad_BC > 0))
        grad_BC = torch.where(free_BC, grad_BC, 0.0)
        direction_BC = grad_BC
        if step > 0:
            memory_B1 = _ratio(grad_BC * (grad_BC - last_BC), last_BC.square()).relu()
            direction_BC = torch.where(free_BC, grad_BC + memory_B1 * previous_BC, 0.0)
        moved_BC = direction_BC * inverse_BC
        moved_BC = moved_BC * _along(dictionary.combine(moved_BC), residual_BD)
        bounded_B1 = (z_BC + moved_BC < 0).any(1, keepdim=True)
        moved_BC = (z_BC + moved_BC).relu() - z_BC
        moved_BD = dictionary.combine(moved_BC)
        share_B1 = torch.where(bounded_B1, _along(moved_BD, residual_BD).clamp(0, 1), 1.0)
        z_BC, residual_BD = z_BC + share_B1 * moved_BC, residual_BD - share_B1 * moved_BD
        last_BC, previous_BC = torch.where(bounded_B1, 0.0, grad_BC), direction_BC
    return z_BC


def _along(direction_BD: Tensor, residual_BD: Tensor) -> Tensor:
    """How far to go along the direction so that the residual becomes shortest."""
    return _ratio(direction_BD * residual_BD, direction_BD.square())


def _ratio(above_BN: Tensor, below_BN: Tensor) -> Tensor:
    """Ratio of the sums of each token; 0 where there is nothing below, or more than the dtype holds."""
    above_B1, below_B1 = above_BN.sum(1, keepdim=True), below_BN.sum(1, keepdim=True)
    defined_B1 = (below_B1 > 0) & below_B1.isfinite() & above_B1.isfinite()
    return torch.where(defined_B1, above_B1 / below_B1.where(defined_B1, 1.0), 0.0)


def _listed_places(taken_BC: Tensor, size: int) -> Tensor:
    """The places marked, ascending; -1 fills up."""
    marked_BC, places_BC = taken_BC.to(torch.int8).sort(dim=1, stable=True, descending=True)
    places_BK = places_BC[:, :size].masked_fill(marked_BC[:, :size] == 0, -1)
    return pad_columns(places_BK, (0, size - places_BK.shape[1]), value=-1)
