"""Values of sampled heads of a Kronecker encoder: pre-latents, post-latents, and kept activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.heads import HeadGrid, head_grid

TOKENS = 2048  # tokens per block


def sample_heads(num_heads: int, cells: int, max_cells: int, seed: int) -> list[int]:
    """Draw heads at random, seeded, at least one and with at most ``max_cells`` cells in total; return them sorted."""
    number = max(1, min(num_heads, max_cells // cells))
    return torch.randperm(num_heads, generator=torch.Generator().manual_seed(seed))[:number].sort().values.tolist()


@dataclass(frozen=True)
class HeadValues:
    """Values of the sampled heads on some tokens; float32 on the CPU. ``R`` heads with M bases and N extensions each.

    Args:
        u_BRM: pre-latents of the bases, before ReLU.
        v_BRN: pre-latents of the extensions.
        composed_BC: post-latents ``gate(u, v)``, before the sparsifier, row-major by head, base, extension.
        kept_BC: the post-latents that the sparsifier kept, else 0.
    """

    u_BRM: Float[Tensor, "B R M"]
    v_BRN: Float[Tensor, "B R N"]
    composed_BC: Float[Tensor, "B C"]
    kept_BC: Float[Tensor, "B C"]


class HeadSample:
    """Function from activations and codes to `HeadValues` of the heads ``heads_R``; C = R * M * N columns."""

    def __init__(self, encoder: KroneckerEncoder, heads: list[int]) -> None:
        grid = head_grid(encoder.config)
        assert grid is not None
        self.encoder, self.grid = encoder, HeadGrid(len(heads), grid.d_base, grid.d_extension)
        self.heads_R = torch.tensor(heads)
        self.weight_RPD = encoder.weight.detach()[heads]
        self.bias_RP = encoder.bias.detach()[heads]
        self._column_of_H = torch.full((grid.num_heads,), -1)
        self._column_of_H[self.heads_R] = torch.arange(len(heads)) * grid.cells

    @property
    def latents_C(self) -> Int[Tensor, " C"]:
        """The latent index of each column."""
        cells = self.grid.cells
        return (self.heads_R.unsqueeze(1) * cells + torch.arange(cells)).flatten()

    @property
    def base_rows(self) -> Int[Tensor, " RM"]:
        """The encoder's rows of the sampled bases, head by head."""
        return self._rows(0, self.grid.d_base)

    @property
    def extension_rows(self) -> Int[Tensor, " RN"]:
        """The encoder's rows of the sampled extensions, head by head."""
        return self._rows(self.grid.d_base, self.grid.d_extension)

    def narrow(self, codes: SparseCodes) -> SparseCodes:
        """Restrict codes to the sampled heads, with column numbers as indices; other codes become padding."""
        column_BK = self._column_of(codes)
        inside_BK = column_BK >= 0
        values_BK = torch.where(inside_BK, codes.values, 0.0)
        return SparseCodes(values_BK, column_BK.clamp_min(0), len(self.latents_C))

    @torch.no_grad()
    def of(self, x_BD: Float[Tensor, "B D"], codes: SparseCodes) -> HeadValues:
        """Return the values on some tokens, given their codes."""
        x_BD = x_BD.to(self.weight_RPD)
        pre_BP = torch.addmm(self.bias_RP.flatten(), x_BD, self.weight_RPD.flatten(0, 1).T)
        pre_BRP = pre_BP.view(len(x_BD), *self.bias_RP.shape)
        u_BRM, v_BRN = pre_BRP[..., : self.grid.d_base], pre_BRP[..., self.grid.d_base :]
        shape = (*u_BRM.shape, v_BRN.shape[-1])
        composed = self.encoder.compose(u_BRM.unsqueeze(-1).expand(shape), v_BRN.unsqueeze(-2).expand(shape))
        return HeadValues(
            u_BRM=u_BRM.float().cpu(),
            v_BRN=v_BRN.float().cpu(),
            composed_BC=composed.flatten(1).float().cpu(),
            kept_BC=self.narrow(codes).to_dense().float().cpu(),
        )

    def _column_of(self, codes: SparseCodes) -> Tensor:
        head_BK = codes.indices // self.grid.cells
        first_BK = self._column_of_H.to(head_BK.device)[head_BK]
        return torch.where(first_BK >= 0, first_BK + codes.indices % self.grid.cells, -1)

    def _rows(self, first: int, number: int) -> Tensor:
        width = self.grid.d_base + self.grid.d_extension
        return (self.heads_R.unsqueeze(1) * width + first + torch.arange(number)).flatten()
