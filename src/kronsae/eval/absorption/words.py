"""SAEBench's two absorption measures per word: whether other latents carry the word's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kronsae.core.codes import SparseCodes
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AbsorptionRule:
    """When latents count as absorbing; the defaults are SAEBench's.

    Args:
        share: minimum share of the probe's projection that absorbing latents must contribute.
        max_absorbers: maximum number of absorbing latents per word (fraction only).
        fraction_cosine: minimum cosine between an absorbing latent and the probe (fraction only).
        full_cosine: minimum cosine between the single absorbing latent and the probe (full absorption only).
        off: a latent of the class is inactive below this activation (full absorption only).
    """

    share: float = 0.4
    max_absorbers: int = 3
    fraction_cosine: float = 0.1
    full_cosine: float = 0.025
    off: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share must be between 0 and 1; got {self.share}.")
        if self.max_absorbers < 1:
            raise UserError(f"max_absorbers must be at least 1; got {self.max_absorbers}.")


@dataclass(frozen=True, eq=False)
class WordAbsorption:
    """Absorption of each word: share of the class carried by other latents, and whether a single one carries it."""

    fraction_E: Float[Tensor, " E"]
    full_E: Bool[Tensor, " E"]


def probe_cosines(direction_D: Float[Tensor, " D"], W_dec_FD: Float[Tensor, "F D"]) -> Float[Tensor, " F"]:
    """Return the cosine between a probe's direction and each row of the dictionary, in the dictionary's dtype."""
    return cosine_similarity((direction_D / direction_D.norm()).to(W_dec_FD), W_dec_FD, dim=-1)


def word_absorption(
    codes: SparseCodes,
    projection_E: Float[Tensor, " E"],
    cosine_F: Float[Tensor, " F"],
    main: Sequence[int],
    rule: AbsorptionRule | None = None,
) -> WordAbsorption:
    """Return the absorption of each word (SAEBench 0.6.0, ``feature_absorption_calculator``; Chanin et al. 2024).

    With ``p = a . d`` and ``c_i = f_i cos(d, W_dec_i)``: main = sum of c over the class's latents, absorbers = sum of
    the 3 largest c > 0 among the other latents with a cosine of at least 0.1.
    Fraction: 0 if main >= p or absorbers / p < 0.4; else 1 if main <= 0; else A / (A + main) with
    A = min(absorbers, p - main).
    Full: all the class's latents are inactive, the latent of the largest c has a cosine of at least 0.025, and
    c / p >= 0.4.
    A word with p <= 0 has neither (SAEBench divides by zero at p = 0).

    Args:
        codes: codes of the words' activations a.
        projection_E: p, with d the unit direction of the class's probe.
        cosine_F: `probe_cosines` of d.
        main: the class's latents.
        rule: the thresholds.
    """
    rule = rule or AbsorptionRule()
    cosine_EK = cosine_F[codes.indices]
    c_EK = codes.values * cosine_EK
    is_main_EK = torch.isin(codes.indices, torch.tensor(list(main), dtype=torch.int64))
    p_E = projection_E.double()
    main_E = c_EK.where(is_main_EK, 0.0).double().sum(-1)
    absorbs_EK = ~is_main_EK & (cosine_EK >= rule.fraction_cosine) & (c_EK > 0)
    largest_EK = c_EK.where(absorbs_EK, 0.0).topk(min(rule.max_absorbers, c_EK.shape[-1]), dim=-1).values
    absorbers_E = largest_EK.double().sum(-1)
    positive_E = p_E > 0
    safe_E = p_E.where(positive_E, 1.0)
    absorbed_E = torch.minimum(absorbers_E, p_E - main_E)
    partial_E = (absorbed_E / (absorbed_E + main_E)).clamp(0, 1)
    fraction_E = partial_E.where(main_E > 0, 1.0)
    applies_E = positive_E & (main_E < p_E) & (absorbers_E / safe_E >= rule.share)
    off_E = ~(is_main_EK & (codes.values >= rule.off)).any(-1)
    top_E1 = c_EK.amax(-1, keepdim=True)
    aligned_E = ((c_EK == top_E1) & (cosine_EK >= rule.full_cosine)).any(-1)
    enough_E = (top_E1.squeeze(-1) > 0) & (top_E1.squeeze(-1).double() / safe_E >= rule.share)
    return WordAbsorption(fraction_E.where(applies_E, 0.0), off_E & aligned_E & positive_E & enough_E)
