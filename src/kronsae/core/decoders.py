"""The decoder: a full dictionary, of which each token reads K rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.codes import SparseCodes


class Decoder(nn.Module):
    """``x_hat = sum_k f_k W_dec[k] + b_dec``, with ``W_dec [d_sae, d_in]``; never a dense B x F product."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def forward(self, codes: SparseCodes) -> Float[Tensor, "B D"]:
        """The reconstruction."""
        return kernels.decode(codes.values, codes.indices, self.W_dec, self.b_dec)

    def combine(self, codes: SparseCodes) -> Float[Tensor, "B D"]:
        """The reconstruction without ``b_dec``: what AuxK adds to the residual."""
        return kernels.decode(codes.values, codes.indices, self.W_dec, torch.zeros_like(self.b_dec))

    @torch.no_grad()
    def initialize(self, rows_FD: Float[Tensor, "F D"]) -> None:
        """Take the encoder's rows as directions; ``b_dec = 0``."""
        self.W_dec.copy_(rows_FD)
        self.normalize()
        self.b_dec.zero_()

    @torch.no_grad()
    def normalize(self) -> None:
        """Scale every row of ``W_dec`` to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))
