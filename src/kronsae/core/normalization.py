"""Putting activations on one scale for training, and taking it back into the weights at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GATES
from kronsae.core.sae import SAE
from kronsae.errors import UserError

NormalizationName = Literal["none", "center_and_scale"]


@dataclass(frozen=True)
class Normalization:
    """``x' = (x - mean) / scale``: mean 0, and ``||x'|| = sqrt(d_in)`` in the root mean square.

    Learning rates and the start's scale then mean the same for every model and layer. Explained variance, and every
    other ratio of errors, is the same on either side.
    """

    mean_D: Float[Tensor, " D"]
    scale: Float[Tensor, ""]

    @staticmethod
    def of(x_BD: Float[Tensor, "B D"]) -> Normalization:
        """Measured on a batch.

        Raises:
            UserError: the activations do not vary.
        """
        mean_D = x_BD.mean(0)
        scale = (x_BD - mean_D).square().sum(-1).mean().sqrt() / math.sqrt(x_BD.shape[1])
        if not scale > 0:
            raise UserError("activations must vary; all of the first batch are equal. Choose another hook or text.")
        return Normalization(mean_D, scale)

    @staticmethod
    def identity(d_in: int, device: torch.device | str) -> Normalization:
        """No change at all."""
        return Normalization(torch.zeros(d_in, device=device), torch.ones((), device=device))

    def __call__(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Activations as the SAE sees them in training."""
        return (x_BD - self.mean_D) / self.scale

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Change the biases of ``sae``, trained on ``x'``, so that it takes and gives raw ``x``.

        With ``s`` the scale: encoder ``b <- s b - W mean``, so pre-latents and latents come out s times as large;
        thresholds times s; decoder ``b_dec <- s b_dec + mean``. Neither ``W_enc`` nor ``W_dec`` changes. It holds
        because latents are homogeneous: pre-latents times s give latents times s. A router, whose probabilities stay
        as they are, takes the scale into its weights.
        """
        sae.encoder.fold(self.mean_D, self.scale)
        sae.sparsifier.rescale(self.scale)
        sae.decoder.b_dec.mul_(self.scale).add_(self.mean_D)


def check_foldable(normalization: NormalizationName, encoder: AnyEncoderConfig) -> None:
    """Refuse a gate whose latents do not scale with their parents: what was trained could not be folded back."""
    shape = encoder.expert if isinstance(encoder, SwitchEncoderConfig) else encoder
    gate = shape.gate if isinstance(shape, KroneckerEncoderConfig) else None
    if normalization != "none" and gate is not None and not GATES[gate].homogeneous:
        raise UserError(
            f"normalize_activations must be 'none' with gate '{gate}', whose latents do not scale with the "
            f"activations; got '{normalization}'. Set normalize_activations='none', or use the gate 'mand'."
        )
