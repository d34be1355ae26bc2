"""Decoder, which sums K rows of the dictionary per token, and the optional linear skip connection."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.kernels import Pursued, PursuitRounds, Rows
from kronsae.support.tensors import aligned


class Decoder(nn.Module):
    """``x_hat = sum_k f_k W_dec[k] + b_dec`` with ``W_dec [d_sae, d_out]``; no dense B x F product."""

    def __init__(self, d_sae: int, d_out: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    def forward(self, codes: SparseCodes) -> Float[Tensor, "B O"]:
        """Return the reconstruction."""
        return kernels.decode(codes.values, codes.indices, self.W_dec, self.b_dec)

    def combine(self, codes: SparseCodes) -> Float[Tensor, "B O"]:
        """Return the reconstruction without ``b_dec``, as used for AuxK and for parts of a sum."""
        return kernels.decode(codes.values, codes.indices, self.W_dec, torch.zeros_like(self.b_dec))

    def products(self, x_BO: Float[Tensor, "B O"], latents_BR: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Return ``<d_f, x>`` for R latents of each token; differentiable."""
        products_BR = kernels.sampled_products(x_BO, self.W_dec, latents_BR)
        return kernels.linear_at(x_BO, self.W_dec, self.W_dec.new_zeros(len(self.W_dec)), latents_BR, products_BR)

    def inverse_norms(self, latents_BR: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Return ``1 / |d_f|`` for R latents of each token, a constant."""
        return kernels.inverse_norms(self.W_dec.detach())[latents_BR]

    def rows(self, codes: SparseCodes) -> Rows:
        """Return the rows of the latents in ``codes``, as `kronsae.kernels.pursue_by` takes them; differentiable."""

        def products(x_BO: Tensor) -> Tensor:
            return self.products(x_BO, codes.indices)

        def combine(z_BR: Tensor) -> Tensor:
            return self.combine(SparseCodes(z_BR, codes.indices, codes.d_sae))

        return Rows(products, combine)

    def pursue(self, target_BO: Float[Tensor, "B O"], candidates: SparseCodes, rounds: PursuitRounds) -> Pursued:
        """Return the pursuit of a target, less the bias, among the candidates; it has no gradient."""
        return kernels.pursue(target_BO, self.W_dec, candidates.values, candidates.indices, rounds)

    @torch.no_grad()
    def initialize(self, rows_FO: Float[Tensor, "F O"]) -> None:
        """Set the rows of ``W_dec`` to these directions at unit norm, and ``b_dec`` to 0."""
        self.W_dec.copy_(rows_FO)
        self.normalize()
        self.b_dec.zero_()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale every row of ``W_dec`` to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def fold(self, mean_O: Float[Tensor, " O"], scale_O: Float[Tensor, " O"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights to give raw y instead of ``(y - mean) / scale``, from latents scaled by ``latent_scale``."""
        self.W_dec.mul_(scale_O / latent_scale)
        self.b_dec.mul_(scale_O).add_(mean_O)


class Skip(nn.Module):
    """``W_skip x``, added to the decoder's output; ``W_skip [d_out, d_in]``, no bias (Paulo et al. 2025).

    It models the linear part of what a transcoder imitates, bypassing the dictionary. It starts at 0.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        return aligned(x) @ self.W_skip.T

    @torch.no_grad()
    def initialize(self) -> None:
        """Set ``W_skip`` to 0."""
        self.W_skip.zero_()

    @torch.no_grad()
    def fold(
        self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], scale_O: Float[Tensor, " O"]
    ) -> Float[Tensor, " O"]:
        """Rewrite weights for raw x and y; return ``W_skip mean``, to be subtracted from the decoder's bias."""
        self.W_skip.mul_(scale_O.unsqueeze(1)).div_(scale_D)
        return self.W_skip @ mean_D
