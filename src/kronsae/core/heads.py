"""Layout of a Kronecker encoder's latents as heads of M x N cells, and the share of each part that is dead."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Shaped
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig


@dataclass(frozen=True)
class HeadGrid:
    """Layout of latents in heads: latent (h, i, j) has index ``h*M*N + i*N + j``."""

    num_heads: int
    d_base: int
    d_extension: int

    @property
    def cells(self) -> int:
        """Number of latents in one head, M*N."""
        return self.d_base * self.d_extension

    def of(self, values_F: Shaped[Tensor, " F"]) -> Shaped[Tensor, "H M N"]:
        """View of one value per latent as head x base x extension."""
        return values_F.view(self.num_heads, self.d_base, self.d_extension)


def head_grid(encoder: AnyEncoderConfig) -> HeadGrid | None:
    """Grid of an encoder config; None without heads. The grid of a switch encoder lists the heads expert by expert."""
    if isinstance(encoder, SwitchEncoderConfig):
        one = head_grid(encoder.expert)
        return None if one is None else HeadGrid(encoder.num_experts * one.num_heads, one.d_base, one.d_extension)
    if isinstance(encoder, KroneckerEncoderConfig):
        return HeadGrid(encoder.num_heads, encoder.d_base, encoder.d_extension)
    return None


@dataclass(frozen=True, kw_only=True)
class DeadShares:
    """Shares of latents, bases, extensions and heads that are dead.

    A base is dead if all N latents with this parent are dead, an extension if all its M latents are, and a head if all
    its M*N latents are. The caller decides when a latent is dead: active on none of a stated number of tokens.

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
        bases=_share_of_false(alive_HMN.any(2)),
        extensions=_share_of_false(alive_HMN.any(1)),
        heads=_share_of_false(alive_HMN.flatten(1).any(1)),
    )


def _share_of_false(flags: Tensor) -> float:
    return float((~flags).double().mean())
