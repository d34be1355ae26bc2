from __future__ import annotations

import pytest
import torch
from tests.eval.toys import kron_sae

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.eval import GalleryConfig, latent_statistics
from kronsae.eval.latents import LatentMeter, choose_heads, choose_latents, rounded
from kronsae.support.errors import UserError


def test_by_hand() -> None:
    meter = LatentMeter(4)
    meter.update(SparseCodes(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0, 1], [1, 3]]), 4))
    meter.update(SparseCodes(torch.tensor([[0.5, 0.0]]), torch.tensor([[1, 0]]), 4))
    found = meter.value()
    assert found.tokens == 3
    assert found.active_tokens == (1, 3, 0, 0)  # a value of 0 is padding: latent 3 was never active
    assert found.max_activation == (1.0, 3.0, 0.0, 0.0)
    assert found.mean_activation == (1.0, 1.833, 0.0, 0.0)  # (2 + 3 + 0.5) / 3
    assert found.frequencies == [1 / 3, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 5, 32])
def test_streaming_equals_dense(size: int) -> None:
    sae, x_BD = kron_sae(5), torch.randn(32, 5)
    found = latent_statistics(sae, x_BD.split(size))
    dense_BF = sae.encode(x_BD).to_dense()
    counts_F = (dense_BF > 0).sum(0)
    assert found.active_tokens == tuple(counts_F.tolist())
    assert found.max_activation == pytest.approx(dense_BF.amax(0).tolist(), rel=1e-3)
    assert found.mean_activation == pytest.approx((dense_BF.sum(0) / counts_F.clamp_min(1)).tolist(), rel=1e-3)


def test_latents_are_chosen_over_all_frequencies_and_never_dead() -> None:
    counts_F = torch.zeros(1000, dtype=torch.int64)
    counts_F[::2] = torch.arange(500) + 1  # latent 2n is active on n + 1 tokens, the odd ones are dead
    chosen = choose_latents(counts_F, 10, seed=0)
    counts = counts_F[chosen].tolist()
    assert len(set(chosen)) == 10
    assert counts == sorted(counts, reverse=True)
    for tenth, count in enumerate(counts):  # one from each tenth of the living
        assert 500 - 50 * (tenth + 1) < count <= 500 - 50 * tenth
    assert chosen == choose_latents(counts_F, 10, seed=0)
    assert chosen != choose_latents(counts_F, 10, seed=1)


def test_all_living_latents_if_there_are_few() -> None:
    assert choose_latents(torch.tensor([0, 3, 0, 9]), 5, seed=0) == [3, 1]
    assert choose_latents(torch.zeros(4, dtype=torch.int64), 5, seed=0) == []


def test_heads_are_chosen_by_their_living_then_by_their_rarest() -> None:
    encoder = kron_sae(4, num_heads=5, d_base=1, d_extension=2).encoder
    assert isinstance(encoder, KroneckerEncoder)
    counts_F = torch.tensor([[9, 0], [2, 2], [9, 1], [0, 0], [2, 9]]).flatten()
    assert choose_heads(counts_F, encoder, 5) == [1, 4, 2, 0]  # head 3 is dead
    assert choose_heads(counts_F, encoder, 2) == [1, 4]


def test_rounding() -> None:
    assert rounded([1.23456, 0.000123456, 0.0]) == (1.235, 0.0001235, 0.0)


def test_the_config_checks_itself() -> None:
    with pytest.raises(UserError, match=r"gallery\.top must be above 0; got 0"):
        GalleryConfig(top=0)
    with pytest.raises(UserError, match=r"gallery\.window must be at least 0; got -1"):
        GalleryConfig(window=-1)
