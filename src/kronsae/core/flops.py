"""What an SAE costs, counted (paper, eq. 7), not measured."""

from __future__ import annotations

from kronsae.core.sae import SAEConfig


def encoder_multiply_adds(config: SAEConfig) -> int:
    """Encoder multiply-adds per token: ``D*F`` dense, ``D*H*(M+N) + H*M*N`` Kronecker."""
    return config.encoder.multiply_adds(config.d_in)


def forward_multiply_adds(config: SAEConfig) -> int:
    """Multiply-adds per token of one forward pass: the encoder's, plus ``K*D`` for K rows of the decoder."""
    return encoder_multiply_adds(config) + config.sparsifier.k * config.d_in


def training_flops(config: SAEConfig, tokens: int) -> int:
    """FLOPs of training on ``tokens``: 2 per multiply-add, forward once and backward twice its cost.

    The convention under which the paper compares at equal FLOPs. A sparse backward pass does less than this counts.
    """
    return 6 * forward_multiply_adds(config) * tokens
