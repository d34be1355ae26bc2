"""Normalisation: what it measures, and that folding changes nothing but where the scale is kept."""

from __future__ import annotations

import math

import pytest
import torch

from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.gates import GATES, HOMOGENEOUS
from kronsae.core.normalization import Normalization, check_foldable
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.errors import UserError


def test_mean_zero_and_norm_root_d() -> None:
    x_BD = torch.randn(500, 6, dtype=torch.float64) * torch.arange(1, 7) + 40
    y_BD = Normalization.of(x_BD)(x_BD)
    torch.testing.assert_close(y_BD.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert y_BD.square().sum(1).mean().sqrt().item() == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize(
    "encoder",
    [DenseEncoderConfig(d_sae=40), KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=4)],
    ids=["dense", "kronecker"],
)
def test_folding_changes_nothing(encoder: EncoderConfig) -> None:
    sae = SAEConfig(d_in=6, encoder=encoder, sparsifier=TopKConfig(k=4)).build(1).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x_BD = torch.randn(50, 6, dtype=torch.float64) * 9 + 30
    normalization = Normalization.of(x_BD)
    codes = sae.encode(normalization(x_BD))
    expected_BD = normalization.scale * sae.decode(codes) + normalization.mean_D
    normalization.fold(sae)
    folded = sae.encode(x_BD)
    torch.testing.assert_close(folded.to_dense(), normalization.scale * codes.to_dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae.decode(folded), expected_BD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_homogeneous_gates_are_those(gate: str) -> None:
    u, v = torch.rand(100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    scales = torch.allclose(GATES[gate](7 * u, 7 * v), 7 * GATES[gate](u, v), rtol=1e-12)
    assert scales == (gate in HOMOGENEOUS)


def test_a_gate_that_cannot_be_folded_is_refused() -> None:
    check_foldable("none", "mand_eps")
    check_foldable("center_and_scale", None)
    with pytest.raises(UserError, match=r"normalize_activations must be 'none' with gate 'mand_eps'"):
        check_foldable("center_and_scale", "mand_eps")


def test_activations_that_do_not_vary_are_refused() -> None:
    with pytest.raises(UserError, match="activations must vary"):
        Normalization.of(torch.ones(5, 3))
