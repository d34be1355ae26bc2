"""Layout of a Kronecker encoder's latents as heads of cells, and the share of each part that is dead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.kernels import cells_per_head


@dataclass(frozen=True)
class HeadGrid:
    """Layout of latents in heads: latent (h, i, j) has index ``h*M*N + i*N + j``.

    With null symbols a head is a grid of M+1 bases and N+1 extensions without its last cell; base M and extension N are
    absent: ``h*C + i*(N+1) + j``, ``C = (M+1)(N+1) - 1``.
    """

    num_heads: int
    d_base: int
    d_extension: int
    null_symbols: bool = False

    @property
    def cells(self) -> int:
        """Number of latents in one head."""
        return cells_per_head(self.d_base, self.d_extension, self.null_symbols)

    def of(self, values_F: Shaped[Tensor, " F"]) -> Shaped[Tensor, "H M N"]:
        """Return one value per latent as head x base x extension; with null symbols M+1 and N+1, the last cell 0."""
        values_HC = values_F.view(self.num_heads, self.cells)
        if not self.null_symbols:
            return values_HC.view(self.num_heads, self.d_base, self.d_extension)
        grid_HC = torch.cat([values_HC, values_HC.new_zeros(self.num_heads, 1)], dim=1)
        return grid_HC.view(self.num_heads, self.d_base + 1, self.d_extension + 1)

    def place(self, latent: int) -> tuple[int, int | None, int | None]:
        """Return a latent's head, and base and extension within it; None: absent."""
        head, cell = divmod(latent, self.cells)
        base, extension = divmod(cell, self.d_extension + self.null_symbols)
        return head, base if base < self.d_base else None, extension if extension < self.d_extension else None


def head_grid(encoder: AnyEncoderConfig) -> HeadGrid | None:
    """Grid of an encoder config; None without heads. The grid of a switch encoder lists the heads expert by expert."""
    if isinstance(encoder, SwitchEncoderConfig):
        one = head_grid(encoder.expert)
        return None if one is None else replace(one, num_heads=encoder.num_experts * one.num_heads)
    if isinstance(encoder, KroneckerEncoderConfig):
        return HeadGrid(encoder.num_heads, encoder.d_base, encoder.d_extension, encoder.null_symbols)
    return None


@dataclass(frozen=True, kw_only=True)
class DeadShares:
    """Shares of latents, bases, extensions and heads that are dead.

    A base is dead if all latents with this parent are dead, an extension likewise, and a head if all its latents are.
    The caller decides when a latent is dead: active on none of a stated number of tokens.

    Args:
        latents: dead latents / d_sae.
        bases: dead bases / (H*M); None without heads.
        extensions: dead extensions / (H*N); None without heads.
        heads: dead heads / H; None without heads.
    """

    latents: float
    bases: float | None = None
    extensions: float | None = None
    heads: float | None = None


def dead_shares(alive_F: Bool[Tensor, " F"], encoder: AnyEncoderConfig) -> DeadShares:
    """Dead shares of an encoder's parts, computed from the mask of its live latents.

    Example:
        >>> import torch
        >>> alive = torch.tensor([True, False, False, False, False, False, False, False])
        >>> dead_shares(alive, KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=2))
        DeadShares(latents=0.875, bases=0.75, extensions=0.75, heads=0.5)
    """
    latents, grid = _share_of_false(alive_F), head_grid(encoder)
    if grid is None:
        return DeadShares(latents=latents)
    alive_HMN = grid.of(alive_F)
    return DeadShares(
        latents=latents,
        bases=_share_of_false(alive_HMN[:, : grid.d_base].any(2)),
        extensions=_share_of_false(alive_HMN[:, :, : grid.d_extension].any(1)),
        heads=_share_of_false(alive_HMN.flatten(1).any(1)),
    )


def _share_of_false(flags: Tensor) -> float:
    return float((~flags).double().mean())
