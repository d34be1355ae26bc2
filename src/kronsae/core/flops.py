"""What an SAE costs, counted (paper, eq. 7), not measured."""

from __future__ import annotations

from kronsae.core.sae import SAEConfig


def encoder_multiply_adds(config: SAEConfig) -> int:
    """Encoder multiply-adds per token: ``D*F`` dense, ``D*H*(M+N) + H*M*N`` Kronecker."""
    return config.encoder.multiply_adds(config.d_in)


def forward_multiply_adds(config: SAEConfig) -> int:
    """Multiply-adds per token of one forward pass: the encoder's, ``K*O`` for K rows of the decoder, ``D*O`` to skip.

    O is ``d_out``, the width written: D for an SAE. Only an SAE with a skip connection has the last term.
    """
    skip = config.d_in * config.d_out if config.skip else 0
    return encoder_multiply_adds(config) + config.sparsifier.k * config.d_out + skip


def training_flops(config: SAEConfig, tokens: int) -> int:
    """FLOPs of training on ``tokens``: 2 per multiply-add, forward once and backward twice its cost.

    The convention under which the paper compares at equal FLOPs. A sparse backward pass does less than this counts.
    """
    return 6 * forward_multiply_adds(config) * tokens
