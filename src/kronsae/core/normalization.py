"""Normalisation of activations for training, and folding it into the weights afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.experts import AnyEncoderConfig, gate_of
from kronsae.core.gates import GATES
from kronsae.core.sae import SAE
from kronsae.core.shares import batch_mean
from kronsae.support.errors import UserError

NormalizationName = Literal["none", "center_and_scale"]


@dataclass(frozen=True)
class Normalization:
    """``x' = (x - mean) / scale`` per hook: mean 0 and a root mean square norm ``||x'|| = sqrt(width)``.

    Learning rates and the scale of initial weights then mean the same for every model and layer, and no hook of several
    outweighs the others. For a single hook, explained variance and every other ratio of errors are the same before and
    after normalisation.

    Args:
        mean_D: mean of each dimension.
        scale_H: one scale per hook.
        widths: number of dimensions of each hook; they sum to D.
    """

    mean_D: Float[Tensor, " D"]
    scale_H: Float[Tensor, " H"]
    widths: tuple[int, ...]

    @staticmethod
    def of(x_BD: Float[Tensor, "B D"], widths: tuple[int, ...] = ()) -> Normalization:
        """Return the normalisation measured on a batch; widths ``()``: a single hook.

        Raises:
            UserError: the activations do not vary.
        """
        widths = widths or (x_BD.shape[1],)
        parts = [_mean_and_scale(part_BD) for part_BD in x_BD.split(widths, dim=1)]
        return Normalization(torch.cat([mean for mean, _ in parts]), torch.stack([scale for _, scale in parts]), widths)

    @staticmethod
    def identity(widths: tuple[int, ...], device: torch.device | str) -> Normalization:
        """Return the normalisation that changes nothing."""
        return Normalization(torch.zeros(sum(widths), device=device), torch.ones(len(widths), device=device), widths)

    @property
    def scale_D(self) -> Float[Tensor, " D"]:
        """Scale of each dimension: that of its hook."""
        return torch.cat([scale.expand(width) for scale, width in zip(self.scale_H, self.widths, strict=True)])

    @property
    def scale(self) -> Float[Tensor, ""]:
        """One scale for all dimensions: the root mean square; for a single hook, the scale of this hook."""
        return self.scale_H[0] if len(self.widths) == 1 else self.scale_D.square().mean().sqrt()

    def __call__(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return normalised activations, as the SAE sees them in training."""
        return (x_BD - self.mean_D) / (self.scale if len(self.widths) == 1 else self.scale_D)

    @torch.no_grad()
    def fold(self, sae: SAE, written: Normalization | None = None) -> None:
        """Rewrite the weights of ``sae``, trained to map ``x'`` to ``y'``, so that it maps raw x to raw y.

        ``written`` is the normalisation of y; None: that of x. Let s and t be the scales of x and y, and ``c`` the root
        mean square of t, which is the scale of the latents. Then ``W_enc <- W_enc c/s``, ``b <- c b - W_enc mean_x``,
        thresholds are multiplied by c, ``W_dec <- W_dec t/c``, ``b_dec <- t b_dec + mean_y`` and
        ``W_skip <- t W_skip / s``. This is exact because latents are homogeneous: pre-latents times c give latents
        times c. The router's probabilities must not change, so its weights take only s. If one hook is written, its t
        is c, and ``W_dec`` keeps its norms; if this hook is also the one read, ``W_enc`` keeps its values too.
        """
        written = self if written is None else written
        sae.encoder.fold(self.mean_D, self.scale_D, written.scale)
        sae.sparsifier.rescale(written.scale)
        sae.decoder.fold(written.mean_D, written.scale_D, written.scale)
        if sae.skip is not None:
            sae.decoder.b_dec.sub_(sae.skip.fold(self.mean_D, self.scale_D, written.scale_D))


def _mean_and_scale(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    mean_D = batch_mean(x_BD)
    scale = batch_mean((x_BD - mean_D).square().sum(-1)).sqrt() / math.sqrt(x_BD.shape[1])
    if not scale > 0:
        raise UserError("activations must vary; all of the first batch are equal. Choose another hook or text.")
    return mean_D, scale


def is_foldable(encoder: AnyEncoderConfig) -> bool:
    """Return whether normalisation can be folded into the weights: whether latents scale with x."""
    gate = gate_of(encoder)
    return gate is None or GATES[gate].homogeneous


def check_foldable(normalization: NormalizationName, encoder: AnyEncoderConfig) -> None:
    """Raise if the gate is not homogeneous: the normalisation could not be folded into the weights."""
    if normalization != "none" and not is_foldable(encoder):
        raise UserError(
            f"normalize_activations must be 'none' with gate '{gate_of(encoder)}', whose latents do not scale with the "
            f"activations; got '{normalization}'. Set normalize_activations='none', or use the gate 'mand'."
        )
