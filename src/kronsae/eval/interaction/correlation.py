"""Pairs of latents within a head and between heads: how they correlate, and how their directions lie.

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
    """A figure of pairs of latents, by how the two stand to each other; pairs without the figure are left out.

    Args:
        within: both of one head: the union of the three kinds that follow.
        same_base: of one head and one base.
        same_extension: of one head and one extension.
        neither: of one head, without a common parent.
        between: of different heads.
    """

    within: Spread
    same_base: Spread
    same_extension: Spread
    neither: Spread
    between: Spread

    @staticmethod
    def of(values_CC: Float[Tensor, "C C"], grid: HeadGrid) -> ByKind:
        """Of a symmetric table of all pairs, NaN where a pair has none."""
        known_CC = ~values_CC.isnan()
        return ByKind(**{name: Spread.of(values_CC[mask_CC & known_CC]) for name, mask_CC in pairs(grid).items()})


class CorrelationMeter:
    """Accumulates Pearson's r of C columns over tokens from batches: C x C numbers in float64, however many tokens.

    A latent that does not vary has no correlation.
    """

    def __init__(self, grid: HeadGrid) -> None:
        self._grid = grid
        columns = grid.num_heads * grid.cells
        self._tokens = 0
        self._sum_C = torch.zeros(columns, dtype=torch.float64)
        self._products_CC = torch.zeros(columns, columns, dtype=torch.float64)

    def update(self, values_BC: Float[Tensor, "B C"]) -> None:
        """Take in activations."""
        values_BC = values_BC.double()
        self._tokens += len(values_BC)
        self._sum_C += values_BC.sum(0)
        self._products_CC.addmm_(values_BC.T, values_BC)

    def matrix(self) -> Float[Tensor, "C C"]:
        """Pearson's r of each pair; NaN where one of the two does not vary."""
        if not self._tokens:
            return torch.full_like(self._products_CC, torch.nan)
        mean_C = self._sum_C / self._tokens
        second_C = self._products_CC.diagonal() / self._tokens
        variance_C = second_C - mean_C.square()
        varies_C = variance_C > 1e-12 * second_C  # below, rounding is all there is
        deviation_C = torch.where(varies_C, variance_C, torch.nan).sqrt()
        covariance_CC = self._products_CC / self._tokens - torch.outer(mean_C, mean_C)
        return (covariance_CC / torch.outer(deviation_C, deviation_C)).clamp(-1, 1)

    def value(self) -> ByKind:
        """The correlations by kind of pair."""
        return ByKind.of(self.matrix(), self._grid)


def cosines(rows_CD: Float[Tensor, "C D"]) -> Float[Tensor, "C C"]:
    """``cos(W_c, W_d) = W_c . W_d / (|W_c| |W_d|)`` of all rows, in float64; NaN where one of them is 0."""
    rows_CD = rows_CD.double()
    unit_CD = rows_CD / torch.linalg.vector_norm(rows_CD, dim=1, keepdim=True)
    cosine_CC: Tensor = unit_CD @ unit_CD.T
    return cosine_CC.clamp(-1, 1)


def pairs(grid: HeadGrid) -> dict[str, Bool[Tensor, "C C"]]:
    """Which pairs (each once, above the diagonal) are of which kind, as `ByKind` names them."""
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
