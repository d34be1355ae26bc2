"""The training loss, AuxK, and the count of dead latents."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.losses import squared_error
from kronsae.core.objective import AuxKConfig, DeadLatents, objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.support.errors import UserError

ENCODERS = [KroneckerEncoderConfig(num_heads=6, d_base=2, d_extension=2), DenseEncoderConfig(d_sae=24)]


@pytest.fixture(params=ENCODERS, ids=["kronecker", "dense"])
def sae(request: pytest.FixtureRequest) -> SAE:
    """24 latents in 6 blocks of 4; the first block is weak but positive on the inputs below, so never chosen."""
    sae = SAEConfig(d_in=8, encoder=request.param, sparsifier=TopKConfig(k=4)).build(seed=0).double()
    with torch.no_grad():
        sae.encoder.weight.flatten(0, -2)[:4] *= 1e-3
        sae.encoder.bias.flatten()[:4] = 0.01
        sae.encoder.bias.flatten()[4:] = 1.0
    return sae


@pytest.fixture
def x_BD() -> Tensor:
    return torch.randn(10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


DEAD_C = torch.arange(4)


def gradients(loss: Tensor, sae: SAE) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def test_squared_error_sums_over_dimensions_and_averages_over_tokens() -> None:
    x_BD = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert squared_error(x_BD, torch.zeros(2, 2)).item() == 2.5


def test_without_dead_latents_the_loss_is_the_squared_error(sae: SAE, x_BD: Tensor) -> None:
    for dead_C, aux_k in (
        (None, None),
        (None, AuxKConfig()),
        (DEAD_C, None),
        (DEAD_C[:0], AuxKConfig()),
        (DEAD_C, AuxKConfig(weight=0.0)),
    ):
        result = objective(sae, x_BD, dead_C, aux_k)
        assert result.auxiliary_loss is None
        assert result.loss.item() == result.reconstruction_loss.item() == squared_error(x_BD, sae(x_BD)).item()
        assert torch.equal(result.x_hat_BO, sae(x_BD))
        assert torch.equal(result.codes.to_dense(), sae.encode(x_BD).to_dense())


@pytest.mark.parametrize("k_aux", [1, 3, 4, None, 100])
def test_auxk_equals_its_definition(sae: SAE, x_BD: Tensor, k_aux: int | None) -> None:
    """Mask all but the dead, TopK, dense decoder without bias, against the fixed residual; plain autograd."""
    aux_k = AuxKConfig(weight=0.5, k_aux=k_aux)
    result = objective(sae, x_BD, DEAD_C, aux_k)
    all_BF = sae.encoder(x_BD).materialize()

    def reconstruct(latents_BF: Tensor, k: int) -> Tensor:
        top = latents_BF.topk(k)
        return torch.zeros_like(latents_BF).scatter(1, top.indices, top.values) @ sae.W_dec

    alive = torch.ones(24, dtype=torch.bool).index_fill(0, DEAD_C, False)
    x_hat_BD = reconstruct(all_BF, 4) + sae.b_dec
    residual_BD = (x_BD - x_hat_BD).detach()
    kept = min(8 // 2 if k_aux is None else k_aux, 4)
    auxiliary = squared_error(residual_BD, reconstruct(all_BF.masked_fill(alive, 0.0), kept))
    assert result.auxiliary_loss is not None
    torch.testing.assert_close(result.auxiliary_loss, auxiliary.detach())
    expected = gradients(squared_error(x_BD, x_hat_BD) + 0.5 * auxiliary, sae)
    for name, gradient in gradients(result.loss, sae).items():
        torch.testing.assert_close(gradient, expected[name], msg=partial("{}: {}".format, name))


def test_auxk_gradient_reaches_the_encoder_and_decoder_rows_of_dead_latents(sae: SAE, x_BD: Tensor) -> None:
    assert not torch.isin(sae.encode(x_BD).indices, DEAD_C).any()
    without = gradients(objective(sae, x_BD).loss, sae)
    with_aux = gradients(objective(sae, x_BD, DEAD_C, AuxKConfig(k_aux=4)).loss, sae)
    # the dead block's parents: rows 0..3 of the flattened pre-latents, for either encoder
    for name in ("encoder.weight", "encoder.bias", "decoder.W_dec"):
        rows = slice(0, 4)
        width = without[name].shape[-1] if name != "encoder.bias" else 1
        assert (without[name].reshape(-1, width)[rows] == 0).all(), name
        assert (with_aux[name].reshape(-1, width)[rows] != 0).any(dim=1).all(), name
        # and nothing else: the residual is held fixed
        torch.testing.assert_close(with_aux[name].reshape(-1, width)[4:], without[name].reshape(-1, width)[4:])
    torch.testing.assert_close(with_aux["decoder.b_dec"], without["decoder.b_dec"])


def test_auxk_lets_dead_latents_learn(sae: SAE, x_BD: Tensor) -> None:
    before = objective(sae, x_BD, DEAD_C, AuxKConfig(weight=1.0)).auxiliary_loss
    for _ in range(20):
        loss = objective(sae, x_BD, DEAD_C, AuxKConfig(weight=1.0)).loss
        steps = gradients(loss, sae)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.sub_(steps[name], alpha=1e-2)
    after = objective(sae, x_BD, DEAD_C, AuxKConfig(weight=1.0)).auxiliary_loss
    assert before is not None
    assert after is not None
    assert after < before


def test_results_for_metrics_carry_no_graph(sae: SAE, x_BD: Tensor) -> None:
    result = objective(sae, x_BD, DEAD_C, AuxKConfig())
    assert result.loss.requires_grad
    assert result.auxiliary_loss is not None
    for tensor in (result.reconstruction_loss, result.auxiliary_loss, result.x_hat_BO):
        assert not tensor.requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -0.1}, "aux_k.weight must be finite and at least 0; got -0.1."),
        ({"weight": float("nan")}, "aux_k.weight must be finite and at least 0; got nan."),
        ({"k_aux": 0}, "aux_k.k_aux must be a whole number above 0; got 0."),
        ({"dead_after_tokens": 0}, "aux_k.dead_after_tokens must be a whole number above 0; got 0."),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        AuxKConfig(**fields)


# --- dead latents ---


def codes(*shape: int, active: list[int], d_sae: int = 5) -> SparseCodes:
    """One token after another holds ``active``; a last place holds latent 0 with value 0."""
    indices = torch.tensor([*active, 0]).expand(*shape, -1).clone()
    values = torch.ones(indices.shape)
    values[..., -1] = 0
    return SparseCodes(values, indices, d_sae)


def test_dead_latents_are_counted_in_tokens() -> None:
    dead = DeadLatents(5)
    dead.update(codes(7, active=[1]))
    assert dead.tokens_since_active_F.tolist() == [7, 0, 7, 7, 7]
    dead.update(codes(3, active=[2, 3]))
    assert dead.tokens_since_active_F.tolist() == [10, 3, 0, 0, 10]
    assert dead.dead(10).tolist() == [0, 4]
    assert dead.dead(11).tolist() == []
    assert dead.dead(3).tolist() == [0, 1, 4]
    dead.update(codes(0, active=[4]))
    assert dead.tokens_since_active_F.tolist() == [10, 3, 0, 0, 10]


def test_dead_latents_count_every_leading_dimension() -> None:
    dead = DeadLatents(5)
    dead.update(codes(2, 3, active=[1]))
    assert dead.tokens_since_active_F.tolist() == [6, 0, 6, 6, 6]


def test_latents_start_alive() -> None:
    assert DeadLatents(4).dead(1).tolist() == []
