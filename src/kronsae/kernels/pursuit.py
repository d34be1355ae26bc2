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
    z_BC, worth_BC, residual_BD = torch.zeros_like(values_BC), values_BC, target_BD
    columns = []
    for number, (size, steps) in enumerate(zip(rounds.sizes, rounds.steps, strict=True)):
        if number > 0:
            worth_BC = dictionary.products(residual_BD) * inverse_BC
        worth_BC = torch.where(left_BC & (worth_BC > 0), worth_BC, 0.0)
        order_BC = worth_BC.gather(1, by_latent_BC).sort(dim=1, stable=True, descending=True).indices
        places_BK = by_latent_BC.gather(1, order_BC[:, :size])
        taken_BC = torch.zeros_like(chosen_BC).scatter_(1, places_BK, True) & (worth_BC > 0)
        left_BC, chosen_BC = left_BC & ~taken_BC, chosen_BC | taken_BC
        columns.append(_listed_places(taken_BC, size))
        started_BC = values_BC if number == 0 else rounds.start * worth_BC * inverse_BC
        started_BC = torch.where(taken_BC, started_BC, 0.0)
        z_BC = z_BC + started_BC
        if steps > 0 or number + 1 < len(rounds.sizes):
            residual_BD = residual_BD - dictionary.combine(started_BC)
        z_BC, residual_BD = refit_by(dictionary, inverse_BC, residual_BD, z_BC, chosen_BC, steps)
    places_BK = torch.cat(columns, dim=1)
    is_chosen_BK, at_BK = places_BK >= 0, places_BK.clamp_min(0)
    values_BK = torch.where(is_chosen_BK, z_BC.gather(1, at_BK), 0.0)
    values_BK = values_BK.masked_fill(~values_BC.isfinite().all(1, keepdim=True), torch.nan)
    is_chosen_BK &= ~values_BK.isnan()
    return Pursued(values_BK, latents_BC.gather(1, at_BK).where(is_chosen_BK, 0), places_BK.where(is_chosen_BK, -1))


def refit_by(
    dictionary: Rows,
    inverse_BC: Float[Tensor, "B C"],
    residual_BD: Float[Tensor, "B D"],
    z_BC: Float[Tensor, "B C"],
    chosen_BC: Bool[Tensor, "B C"],
    steps: int,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B D"]]:
    """Take some steps of projected conjugate gradients; return the values and what they leave unexplained.

    ``g_c = <d_c, e> / |d_c|`` with the residual e, and 0 where a value of 0 would fall. The direction is ``s = g +
    max(0, <g, g - g'> / <g', g'>) s'``, with g' and s' of the step before; at first it is g. The values change by ``a
    s_c / |d_c|``, where a minimises ``|e|``. Where a value would become negative, the changes are cut so that it
    becomes 0, of the cut changes the share from 0 to 1 that minimises ``|e|`` is made, and the next direction is g
    again. Apart from rounding, no step raises ``|e|``. Differentiable, but with ``|d_c|`` held fixed.
    """
    last_grad_BC = last_direction_BC = torch.zeros_like(z_BC)
    for step in range(steps):
        grad_BC = dictionary.products(residual_BD) * inverse_BC
        free_BC = chosen_BC & ((z_BC > 0) | (grad_BC > 0))
        grad_BC = torch.where(free_BC, grad_BC, 0.0)
        direction_BC = grad_BC
        if step > 0:
            kept_B1 = _ratio(grad_BC, grad_BC - last_grad_BC, last_grad_BC).relu()
            direction_BC = torch.where(free_BC, grad_BC + kept_B1 * last_direction_BC, 0.0)
        change_BC = direction_BC * inverse_BC
        explained_BD = dictionary.combine(change_BC)
        change_BC = _ratio(explained_BD, residual_BD, explained_BD) * change_BC
        is_cut_B1 = (z_BC + change_BC < 0).any(1, keepdim=True)
        change_BC = (z_BC + change_BC).relu() - z_BC
        explained_BD = dictionary.combine(change_BC)
        share_B1 = _ratio(explained_BD, residual_BD, explained_BD).clamp(0, 1)
        share_B1 = torch.where(is_cut_B1, share_B1, 1.0)
        z_BC, residual_BD = z_BC + share_B1 * change_BC, residual_BD - share_B1 * explained_BD
        last_grad_BC, last_direction_BC = torch.where(is_cut_B1, 0.0, grad_BC), direction_BC
    return z_BC, residual_BD


def _ratio(a_BN: Tensor, b_BN: Tensor, c_BN: Tensor) -> Tensor:
    """``<a, b> / <c, c>`` of each token, summed in float32 at least; 0 where it is not defined.

    Where ``<c, c>`` is below the smallest normal number, the derivative of the ratio would overflow.
    """
    dtype = a_BN.dtype
    if dtype.itemsize < 4:  # a square overflows float16 above 255
        a_BN, b_BN, c_BN = a_BN.float(), b_BN.float(), c_BN.float()
    above_B1, below_B1 = (a_BN * b_BN).sum(1, keepdim=True), c_BN.square().sum(1, keepdim=True)
    is_defined_B1 = (below_B1 >= torch.finfo(below_B1.dtype).tiny) & below_B1.isfinite() & above_B1.isfinite()
    return torch.where(is_defined_B1, above_B1 / below_B1.where(is_defined_B1, 1.0), 0.0).to(dtype)


def _listed_places(taken_BC: Tensor, size: int) -> Tensor:
    """The places marked, ascending; -1 fills up."""
    marked_BC, places_BC = taken_BC.to(torch.int8).sort(dim=1, stable=True, descending=True)
    places_BK = places_BC[:, :size].masked_fill(marked_BC[:, :size] == 0, -1)
    return pad_columns(places_BK, (0, size - places_BK.shape[1]), value=-1)
