"""Correlations and decoder cosines of pairs of latents, within a head and between heads.

Figures 6 and 19 of arXiv 2505.22255.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kronsae.core.heads import HeadGrid
from kronsae.eval.interaction.spread import Spread


@dataclass(frozen=True, kw_only=True)
class ByKind:
    """A metric of pairs of latents, by kind of pair; pairs where it is undefined (NaN) are excluded.

    Args:
        within: both latents in the same head: the union of the next three kinds.
        same_base: same head, same base.
        same_extension: same head, same extension.
        neither: same head, no common parent.
        between: different heads.
    """

    within: Spread
    same_base: Spread
    same_extension: Spread
    neither: Spread
    between: Spread

    @staticmethod
    def of(values_CC: Float[Tensor, "C C"], grid: HeadGrid) -> ByKind:
        """Summarise a symmetric matrix over all pairs; NaN where undefined."""
        known_CC = ~values_CC.isnan()
        return ByKind(**{name: Spread.of(values_CC[mask_CC & known_CC]) for name, mask_CC in pairs(grid).items()})


class CorrelationMeter:
    """Accumulator of Pearson's r between C columns over tokens: C x C float64 numbers, independent of the token count.

    Correlations with a latent that does not vary are undefined.
    """

    def __init__(self, grid: HeadGrid) -> None:
        self._grid = grid
        columns = grid.num_heads * grid.cells
        self._tokens = 0
        self._sum_C = torch.zeros(columns, dtype=torch.float64)
        self._products_CC = torch.zeros(columns, columns, dtype=torch.float64)

    def update(self, values_BC: Float[Tensor, "B C"]) -> None:
        """Add activations."""
        values_BC = values_BC.double()
        self._tokens += len(values_BC)
        self._sum_C += values_BC.sum(0)
        self._products_CC.addmm_(values_BC.T, values_BC)

    def matrix(self) -> Float[Tensor, "C C"]:
        """Return Pearson's r of each pair; NaN if one of the two does not vary."""
        if not self._tokens:
            return torch.full_like(self._products_CC, torch.nan)
        mean_C = self._sum_C / self._tokens
        second_C = self._products_CC.diagonal() / self._tokens
        variance_C = second_C - mean_C.square()
        varies_C = variance_C > 1e-12 * second_C  # below this, the variance is rounding error
        deviation_C = torch.where(varies_C, variance_C, torch.nan).sqrt()
        covariance_CC = self._products_CC / self._tokens - torch.outer(mean_C, mean_C)
        return (covariance_CC / torch.outer(deviation_C, deviation_C)).clamp(-1, 1)

    def value(self) -> ByKind:
        """Return the correlations by kind of pair."""
        return ByKind.of(self.matrix(), self._grid)


def cosines(rows_CD: Float[Tensor, "C D"]) -> Float[Tensor, "C C"]:
    """Return ``cos(W_c, W_d) = W_c . W_d / (|W_c| |W_d|)`` of all pairs of rows, in float64; NaN for rows of zeros."""
    rows_CD = rows_CD.double()
    unit_CD = rows_CD / torch.linalg.vector_norm(rows_CD, dim=1, keepdim=True)
    cosine_CC: Tensor = unit_CD @ unit_CD.T
    return cosine_CC.clamp(-1, 1)


def pairs(grid: HeadGrid) -> dict[str, Bool[Tensor, "C C"]]:
    """Return a mask of pairs for each kind of `ByKind`; each pair occurs once, above the diagonal."""
    number_C = torch.arange(grid.num_heads * grid.cells)
    head_C, base_C, extension_C = (
        number_C // grid.cells,
        number_C // grid.d_extension % grid.d_base,
        number_C % grid.d_extension,
    )
    above_CC = torch.ones(len(number_C), len(number_C), dtype=torch.bool).triu(1)
    head_CC, base_CC, extension_CC = (one.unsqueeze(1) == one for one in (head_C, base_C, extension_C))
    within_CC = above_CC & head_CC
    return {
        "within": within_CC,
        "same_base": within_CC & base_CC,
        "same_extension": within_CC & extension_CC,
        "neither": within_CC & ~base_CC & ~extension_CC,
        "between": above_CC & ~head_CC,
    }
