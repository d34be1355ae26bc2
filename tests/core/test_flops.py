"""Costs counted by hand and the paper's table of savings (section 3 of arXiv 2505.22255)."""

from __future__ import annotations

import pytest

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.flops import encoder_multiply_adds, forward_multiply_adds, training_flops
from kronsae.core.sae import SAEConfig, count_parameters
from kronsae.core.sparsifiers import TopKConfig


def dense(d_in: int, d_sae: int, k: int) -> SAEConfig:
    return SAEConfig(d_in=d_in, encoder=DenseEncoderConfig(d_sae=d_sae), sparsifier=TopKConfig(k=k))


def kron(d_in: int, num_heads: int, d_base: int, d_extension: int, k: int) -> SAEConfig:
    encoder = KroneckerEncoderConfig(num_heads=num_heads, d_base=d_base, d_extension=d_extension)
    return SAEConfig(d_in=d_in, encoder=encoder, sparsifier=TopKConfig(k=k))


def test_by_hand() -> None:
    topk = dense(10, 48, 3)
    assert encoder_multiply_adds(topk) == 10 * 48 == 480
    assert forward_multiply_adds(topk) == 480 + 3 * 10 == 510
    assert training_flops(topk, tokens=7) == 6 * 510 * 7 == 21_420
    # 6 heads of 2 + 4 pre-latents, 48 post-latents
    pair = kron(10, 6, 2, 4, 3)
    assert encoder_multiply_adds(pair) == 10 * 6 * 6 + 48 == 408
    assert forward_multiply_adds(pair) == 408 + 30
    assert training_flops(pair, tokens=7) == 6 * 438 * 7


def test_null_symbols_cost_cells_and_no_rows() -> None:
    encoder = KroneckerEncoderConfig(num_heads=6, d_base=2, d_extension=2, null_symbols=True)
    config = SAEConfig(d_in=10, encoder=encoder, sparsifier=TopKConfig(k=3))
    assert encoder_multiply_adds(config) == 10 * 6 * 4 + 6 * 8
    assert count_parameters(config.build().encoder) == 6 * 4 * 11


@pytest.mark.parametrize(
    ("d_base", "d_extension", "saving"),
    [(1, 4, 0.8), (2, 4, 1.33), (4, 4, 2.0), (4, 8, 2.67), (8, 8, 4.0), (8, 16, 5.33)],
)
def test_the_papers_savings_of_the_encoder_product(d_base: int, d_extension: int, saving: float) -> None:
    d_in, d_sae = 1536, 2**15
    heads = d_sae // (d_base * d_extension)
    pair = kron(d_in, heads, d_base, d_extension, 50)
    product = encoder_multiply_adds(pair) - d_sae  # without the H*M*N products of the gate
    assert encoder_multiply_adds(dense(d_in, d_sae, 50)) / product == pytest.approx(saving, abs=0.005)
    assert d_base * d_extension / (d_base + d_extension) == pytest.approx(saving, abs=0.005)


def test_counts_are_whole_numbers_at_full_scale() -> None:
    flops = training_flops(kron(2304, 2**14, 2, 4, 50), tokens=2_000_000_000)
    assert isinstance(flops, int)
    assert flops == 6 * (2304 * 2**14 * 6 + 2**17 + 50 * 2304) * 2_000_000_000
