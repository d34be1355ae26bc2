"""Normalisation: what it measures, and that folding changes nothing but where the scale is kept."""

from __future__ import annotations

import math

import pytest
import torch

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GATES
from kronsae.core.normalization import Normalization, check_foldable
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.support.errors import UserError


def test_mean_zero_and_norm_root_d() -> None:
    x_BD = torch.randn(500, 6, dtype=torch.float64) * torch.arange(1, 7) + 40
    y_BD = Normalization.of(x_BD)(x_BD)
    torch.testing.assert_close(y_BD.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert y_BD.square().sum(1).mean().sqrt().item() == pytest.approx(math.sqrt(6))


KRON = KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=4)


@pytest.mark.parametrize(
    ("encoder", "sparsifier"),
    [
        (DenseEncoderConfig(d_sae=40), TopKConfig(k=4)),
        (KRON, TopKConfig(k=4)),
        (KRON, BatchTopKConfig(k=4)),
        (KRON, JumpReLUConfig(k=4)),
        (TrunkEncoderConfig(trunk=DenseEncoderConfig(d_sae=16), heads=KRON), TopKConfig(k=4)),
        (TrunkEncoderConfig(trunk=DenseEncoderConfig(d_sae=16), heads=KRON), JumpReLUConfig(k=4)),
        (SwitchEncoderConfig(num_experts=3, expert=DenseEncoderConfig(d_sae=40)), TopKConfig(k=4)),
        (SwitchEncoderConfig(num_experts=3, expert=KRON), TopKConfig(k=4)),
    ],
    ids=["dense", "kronecker", "batch_topk", "jumprelu", "trunk", "trunk jumprelu", "switch", "switch kronecker"],
)
def test_folding_changes_nothing(encoder: AnyEncoderConfig, sparsifier: SparsifierConfig) -> None:
    sae = SAEConfig(d_in=6, encoder=encoder, sparsifier=sparsifier).build(1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
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
    learned = [] if GATES[gate].start is None else [torch.zeros(1, dtype=torch.float64)]
    z = GATES[gate](u, v, *learned)
    scales = torch.allclose(GATES[gate](7 * u, 7 * v, *learned), 7 * z, rtol=1e-12)
    assert scales == GATES[gate].homogeneous


def test_a_gate_that_cannot_be_folded_is_refused() -> None:
    eps = KroneckerEncoderConfig(num_heads=5, d_base=2, d_extension=4, gate="mand_eps")
    check_foldable("none", eps)
    check_foldable("center_and_scale", KRON)
    check_foldable("center_and_scale", DenseEncoderConfig(d_sae=4))
    with pytest.raises(UserError, match=r"normalize_activations must be 'none' with gate 'mand_eps'"):
        check_foldable("center_and_scale", eps)
    with pytest.raises(UserError, match=r"normalize_activations must be 'none' with gate 'mand_eps'"):
        check_foldable("center_and_scale", SwitchEncoderConfig(num_experts=2, expert=eps))


def test_activations_that_do_not_vary_are_refused() -> None:
    with pytest.raises(UserError, match="activations must vary"):
        Normalization.of(torch.ones(5, 3))
