"""Computed cost of an SAE (paper, eq. 7); nothing is measured."""

from __future__ import annotations

from kronsae.core.sae import SAEConfig


def encoder_multiply_adds(config: SAEConfig) -> int:
    """Encoder multiply-adds per token: ``D*F`` dense, ``D*H*(M+N) + F`` Kronecker."""
    return config.encoder.multiply_adds(config.d_in)


def forward_multiply_adds(config: SAEConfig) -> int:
    """Multiply-adds per token of one forward pass.

    Sum of the encoder's, ``K*O`` for K decoder rows and, only with a skip connection, ``D*O``. O is ``d_out``, the
    output width; it equals D for an SAE. A pursuit adds `Pursuit.multiply_adds`.
    """
    skip = config.d_in * config.d_out if config.skip else 0
    pursued = 0 if config.pursuit is None else config.pursuit.multiply_adds(config.sparsifier.k, config.d_in)
    return encoder_multiply_adds(config) + config.sparsifier.k * config.d_out + skip + pursued


def training_flops(config: SAEConfig, tokens: int) -> int:
    """FLOPs of training on ``tokens``: 2 per multiply-add, forward once, and backward at twice the forward cost.

    The paper uses this convention to compare at equal FLOPs. A sparse backward pass costs less than this count.
    """
    return 6 * forward_multiply_adds(config) * tokens
