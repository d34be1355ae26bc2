"""Pursuit of an SAE's codes: from all latents by the definition, its gradients, its refusals, and what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.core.conftest import D_IN, dense, kron, switch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from kronsae import kernels
from kronsae.core import checkpoint
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig
from kronsae.core.flops import forward_multiply_adds
from kronsae.core.objective import AuxKConfig, objective
from kronsae.core.pursuit import Pursuit, PursuitLearning, pursue, unrolled_values
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, TopKConfig
from kronsae.kernels import Pursued, PursuitRounds, reference
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed

PLAIN = Pursuit(rounds=1, refit=0)
SHAPES: dict[str, AnyEncoderConfig] = {
    "dense": dense(24),
    "kron": kron(4, 2, 3),
    "kron, raw_product": kron(4, 2, 3, "raw_product"),
    "switch": switch(dense(12)),
    "switch, kron": switch(kron(2, 2, 3)),
}


def build(
    encoder: AnyEncoderConfig, k: int = 5, pursuit: Pursuit | None = None, dtype: torch.dtype = torch.float64
) -> SAE:
    sae = SAEConfig(d_in=D_IN, encoder=encoder, sparsifier=TopKConfig(k=k), pursuit=pursuit).build(1).to(dtype)
    with torch.no_grad():
        sae.decoder.W_dec.mul_(torch.rand(sae.d_sae, 1, dtype=dtype) + 0.5)  # rows of many norms
        sae.decoder.b_dec.normal_(std=0.1)
    return sae


def inputs(tokens: int = 17, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def encoder(request: pytest.FixtureRequest) -> AnyEncoderConfig:
    return SHAPES[request.param]


@pytest.mark.parametrize("path", ["cpu", "portable", "reference"])
@pytest.mark.parametrize("pursuit", [Pursuit(), Pursuit(rounds=3, candidates=2, refit=1), Pursuit(rounds=1, refit=4)])
@torch.no_grad()
def test_against_all_latents(encoder: AnyEncoderConfig, path: str, pursuit: Pursuit) -> None:
    """The candidates sorted out of all F latents, then the definition: the fast path's codes, latent by latent."""
    sae, x_BD = build(encoder), inputs()
    z_BF = sae.encoder(x_BD).materialize().relu()
    best = z_BF.sort(dim=1, stable=True, descending=True)
    proposed = pursuit.proposed(5)
    codes = best.values[:, :proposed], best.indices[:, :proposed]
    want = reference.pursue(x_BD - sae.b_dec, sae.W_dec, *codes, pursuit.planned(5))
    dense_want = torch.zeros_like(z_BF).scatter_add_(1, want.latents_BK, want.values_BK)
    with kernels.use(path):
        got = sae.encode(x_BD, pursuit)
    torch.testing.assert_close(got.to_dense(), dense_want, rtol=0, atol=1e-12)
    assert got.values.shape == (17, 5)
    assert (got.values >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_round_without_refit_is_the_encoder_bit_for_bit(encoder: AnyEncoderConfig, dtype: torch.dtype) -> None:
    sae, x_BD = build(encoder, dtype=dtype), inputs(dtype=dtype)
    plain, same = sae.encode(x_BD), sae.encode(x_BD, PLAIN)
    assert torch.equal(plain.values, same.values)
    assert torch.equal(plain.indices, same.indices)
    own = build(encoder, dtype=dtype, pursuit=Pursuit())
    own.load_state_dict(sae.state_dict())
    assert not torch.equal(own.encode(x_BD).values, plain.values)
    assert torch.equal(own.encode(x_BD, PLAIN).values, plain.values)


@torch.no_grad()
def test_leading_dimensions_and_what_forward_does(encoder: AnyEncoderConfig) -> None:
    sae, x_BD = build(encoder, pursuit=Pursuit()), inputs(12)
    codes = sae.encode(x_BD)
    again = sae.encode(x_BD.view(3, 4, D_IN))
    assert torch.equal(again.values, codes.values.view(3, 4, 5))
    assert torch.equal(sae(x_BD), sae.decode(codes))


@torch.no_grad()
def test_the_scale_of_a_latent_plays_no_part() -> None:
    """Rows c times as long and values c times as small reconstruct the same."""
    sae, x_BD = build(kron(4, 2, 3)), inputs()
    want = sae.decode(sae.encode(x_BD, Pursuit()))
    sae.encoder.weight.mul_(1 / 4)
    sae.encoder.bias.mul_(1 / 4)
    sae.decoder.W_dec.mul_(4)
    torch.testing.assert_close(sae.decode(sae.encode(x_BD, Pursuit())), want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_refitting_lowers_the_error() -> None:
    sae, x_BD = build(dense(24), k=3), inputs(200)
    errors = [float((x_BD - sae.decode(sae.encode(x_BD, Pursuit(rounds=1, refit=n)))).square().sum()) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.9 * errors[0]


def test_rounds_share_k() -> None:
    assert Pursuit().planned(5) == PursuitRounds((3, 2), (1, 2), 0.7)
    assert Pursuit(rounds=3, refit=0).planned(3).steps == (0, 0, 0)
    assert Pursuit(rounds=2).sizes(32) == (16, 16)
    assert Pursuit(rounds=3).sizes(32) == (11, 11, 10)
    assert Pursuit(rounds=5).sizes(8) == (2, 2, 2, 1, 1)
    assert Pursuit(rounds=1, candidates=4).proposed(8) == 8
    assert Pursuit(rounds=2, candidates=4).proposed(8) == 32


def test_the_rows_it_reads_are_counted() -> None:
    assert Pursuit(rounds=1, refit=0).multiply_adds(32, 256) == 0
    # 32 subtracted; products with 32, and what the step does
    assert Pursuit(rounds=1, refit=1).multiply_adds(32, 256) == (32 + 64) * 256
    # 16 subtracted; 48 candidates left
    assert Pursuit(rounds=2, refit=0).multiply_adds(32, 256) == (16 + 48) * 256
    # 16, a step of 16; 48; 16, then two steps of 32
    assert Pursuit(rounds=2, refit=2).multiply_adds(32, 256) == (16 + 32 + 48 + 16 + 128) * 256
    shape = SAEConfig(d_in=256, encoder=dense(4096), sparsifier=TopKConfig(k=32))
    pursued = replace(shape, pursuit=Pursuit())
    assert forward_multiply_adds(pursued) - forward_multiply_adds(shape) == 240 * 256


def values_and_parts(tokens: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Pursued]:
    """Unrolled values as a function of x, candidates and dictionary; what is chosen and the rows' norms stay fixed."""
    sae, x_BD = build(kron(4, 2, 3), k=4), inputs(tokens)
    rounds = PursuitRounds((2, 2), (1, 3), 0.7)
    with torch.no_grad():
        candidates = sae.encoder(x_BD).choose(kernels.Choice(8))[0]
        found = kernels.pursue(x_BD - sae.b_dec, sae.W_dec, candidates.values, candidates.indices, rounds)
        assert (found.places_BK >= 0).sum() > 3 * tokens
        norm_F = sae.W_dec.norm(dim=1, keepdim=True)

    def values(target_BD: Tensor, proposed_BC: Tensor, W_dec_FD: Tensor) -> Tensor:
        decoder, proposed = Decoder(*W_dec_FD.shape), SparseCodes(proposed_BC, candidates.indices, candidates.d_sae)
        del decoder.W_dec
        decoder.W_dec = W_dec_FD  # type: ignore[assignment]  # a function of the argument, not a parameter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "inverse_norms", lambda W: torch.ones(len(W), dtype=W.dtype))
            return unrolled_values(target_BD, decoder, proposed, found, rounds)

    parts = (x_BD, candidates.values.clone(), sae.W_dec.detach() / norm_F)
    return values, tuple(part.requires_grad_() for part in parts), found


def test_gradients_of_values() -> None:
    """Every derivative against finite differences."""
    values, parts, _ = values_and_parts(3)
    assert torch.autograd.gradcheck(values, parts, atol=1e-7)
    # a derivative that is wrong by a tenth is noticed
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *a: values(*a) + 0.1 * a[1][:, :4].detach(), parts)


def test_gradients_of_values_at_their_bound() -> None:
    """Against finite differences along random directions, of many tokens, so that some values meet their bound."""
    values, parts, found = values_and_parts(40)
    assert ((found.values_BK == 0) & (found.places_BK >= 0)).sum() > 5
    torch.manual_seed(0)
    weights_BK = torch.randn(40, 4, dtype=torch.float64)
    grads = torch.autograd.grad((weights_BK * values(*parts)).sum(), parts)
    for part, grad in zip(parts, grads, strict=True):
        for _ in range(5):
            direction, step = torch.randn_like(part), 1e-6
            sides = [
                (weights_BK * values(*(one + sign * step * direction if one is part else one for one in parts))).sum()
                for sign in (1, -1)
            ]
            slope = float((sides[0] - sides[1]).detach()) / (2 * step)
            computed = float((grad * direction).sum())
            assert slope == pytest.approx(computed, rel=1e-6, abs=1e-6)
            assert slope != pytest.approx(1.01 * computed, rel=1e-6, abs=1e-6)  # an error of a hundredth is noticed


def test_gradients_are_finite_where_squares_are_hardly_numbers() -> None:
    """One token of norm 1e-20 among others, in float32: squares of its residual are subnormal."""
    sae = build(dense(24), k=5, pursuit=Pursuit(), dtype=torch.float32)
    x_BD = inputs(17, dtype=torch.float32)
    x_BD[3] *= 1e-20
    with torch.no_grad():
        sae.decoder.b_dec.zero_()
    x_BD.requires_grad_()
    objective(sae, x_BD, pursuit_learning="unrolled").loss.backward()
    for name, parameter in [*sae.named_parameters(), ("x", x_BD)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("path", ["cpu", "portable", "reference"])
def test_unrolled_values_are_the_values(encoder: AnyEncoderConfig, path: str) -> None:
    sae, x_BD = build(encoder), inputs()
    with kernels.use(path):
        with torch.no_grad():
            plain = sae.encode(x_BD, Pursuit())
        graph = sae.encode(x_BD, Pursuit())
    assert graph.values.requires_grad
    assert torch.equal(graph.indices, plain.indices)
    torch.testing.assert_close(graph.values.detach(), plain.values, rtol=0, atol=1e-12)


LEARNING: tuple[PursuitLearning, ...] = get_args(PursuitLearning)


@pytest.mark.parametrize("learning", LEARNING)
def test_every_part_learns_and_dead_latents_too(learning: PursuitLearning) -> None:
    sae, x_BD = build(kron(4, 2, 3), pursuit=Pursuit()), inputs(64)
    dead_C = torch.tensor([1, 5, 9, 20])
    result = objective(sae, x_BD, dead_C, AuxKConfig(k_aux=2), pursuit_learning=learning)
    assert result.auxiliary_loss is not None
    result.loss.backward()
    assert isinstance(sae.encoder.config, KroneckerEncoderConfig)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    error = (x_BD - sae.decode(sae.encode(x_BD))).square().sum(1).mean()
    torch.testing.assert_close(result.reconstruction_loss, error.detach())


def test_two_losses_from_their_definition(encoder: AnyEncoderConfig) -> None:
    """The pursued codes as constants, and the SAE without a pursuit: their losses and gradients, summed."""
    x_BD, weights = inputs(33), build(encoder).state_dict()
    grads = []
    for separately in (False, True):
        sae = build(encoder, pursuit=Pursuit())
        sae.load_state_dict(weights)
        if separately:
            codes = sae.encode(x_BD)
            pursued = SparseCodes(codes.values.detach(), codes.indices, codes.d_sae)
            sae.pursuit = None
            total = (x_BD - sae.decode(pursued)).square().sum(1).mean() + objective(sae, x_BD).loss
        else:
            total = objective(sae, x_BD).loss
        total.backward()
        grads.append({name: parameter.grad for name, parameter in sae.named_parameters()} | {"loss": total.detach()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("learning", LEARNING)
def test_a_pursuit_that_changes_nothing_learns_as_none(learning: PursuitLearning) -> None:
    x_BD = inputs(33)
    plain, same = (build(kron(4, 2, 3), pursuit=pursuit) for pursuit in (None, PLAIN))
    same.load_state_dict(plain.state_dict())
    for sae in (plain, same):
        objective(sae, x_BD, pursuit_learning=learning).loss.backward()
    for one, other in zip(plain.parameters(), same.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("learning", LEARNING)
def test_gradients_kept_as_entries_are_the_same(learning: PursuitLearning) -> None:
    x_BD = inputs(33)
    grads = []
    for collected in (False, True):
        sae = build(kron(4, 2, 3), pursuit=Pursuit())
        torch.manual_seed(0)
        with torch.no_grad():
            sae.decoder.W_dec.copy_(torch.randn(24, D_IN, dtype=torch.float64))
            sae.decoder.b_dec.zero_()
        if collected:
            with kernels.collect_row_gradients() as rows:
                loss = objective(sae, x_BD, pursuit_learning=learning).loss
            loss.backward()
            rows.materialize()
        else:
            objective(sae, x_BD, pursuit_learning=learning).loss.backward()
        grads.append({name: parameter.grad for name, parameter in sae.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-12, msg=name)


def test_saved_with_the_sae(tmp_path: Path) -> None:
    sae, x_BD = build(kron(4, 2, 3), pursuit=Pursuit(rounds=3, refit=1)), inputs()
    checkpoint.save(sae, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == sae.config
    assert loaded.config.pursuit == Pursuit(rounds=3, refit=1)
    assert "pursuit_rounds=3" in repr(loaded)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x_BD).values, sae.encode(x_BD).values)


def test_folders_of_before_pursuit_load_as_before(tmp_path: Path) -> None:
    sae = build(kron(4, 2, 3))
    checkpoint.save(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["sae"].pop("pursuit") is None
    write_sealed(tmp_path / "cfg.json", config)
    loaded = checkpoint.load(tmp_path)
    assert loaded.pursuit is None
    assert torch.equal(loaded.encode(inputs()).values, sae.encode(inputs()).values)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rounds": 0}, "pursuit.rounds must be a whole number above 0; got 0."),
        ({"candidates": 0}, "pursuit.candidates must be a whole number above 0; got 0."),
        ({"refit": -1}, "pursuit.refit must be a whole number from 0; got -1."),
        ({"start": 0.0}, "pursuit.start must be above 0 and at most 1; got 0.0."),
        ({"start": 1.5}, "pursuit.start must be above 0 and at most 1; got 1.5."),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as error:
        replace(Pursuit(), **changes)
    assert str(error.value) == text


def test_saes_that_are_refused() -> None:
    topk = TopKConfig(k=4)
    cases = [
        (
            SAEConfig(d_in=6, encoder=dense(24), sparsifier=topk, write_widths=(8,)),
            Pursuit(),
            "pursuit needs an SAE of one hook that reconstructs what it reads; got a transcoder. What a transcoder is "
            "to write is unknown when it encodes, and the hooks of a crosscoder have no common scale. Leave it out.",
        ),
        (
            SAEConfig(d_in=6, encoder=dense(24), sparsifier=topk, read_widths=(4, 2)),
            Pursuit(),
            "got a crosscoder.",
        ),
        (
            SAEConfig(d_in=6, encoder=dense(24), sparsifier=JumpReLUConfig(k=4)),
            Pursuit(),
            "pursuit shares out a k that is the same for every token, as sparsifier 'topk' has; got 'jumprelu', whose "
            "thresholds were learned for the encoder's own values. Leave pursuit out.",
        ),
        (SAEConfig(d_in=6, encoder=dense(24), sparsifier=BatchTopKConfig(k=4)), Pursuit(), "got 'batch_topk'"),
        (
            SAEConfig(d_in=6, encoder=dense(24), sparsifier=topk),
            Pursuit(rounds=5),
            "pursuit.rounds must be at most k; got 5 with k=4. Take fewer rounds.",
        ),
        (
            SAEConfig(d_in=6, encoder=dense(24), sparsifier=topk),
            Pursuit(candidates=7),
            "pursuit.candidates * k must be at most the latents a token can have, 24; got 7 * 4. Take fewer "
            "candidates.",
        ),
    ]
    x_BD = inputs(2).float()
    for config, pursuit, text in cases:
        for refused in (partial(replace, config, pursuit=pursuit), partial(config.build().encode, x_BD, pursuit)):
            with pytest.raises(UserError) as error:
                refused()
            assert text in str(error.value)


def test_pursue_alone_takes_what_it_is_given() -> None:
    sae, x_BD = build(dense(24)), inputs()
    candidates = sae.encoder(x_BD).choose(kernels.Choice(10))[0]
    with torch.no_grad():
        codes = pursue(Pursuit(), x_BD, candidates, sae.decoder, 5)
        assert torch.equal(codes.values, sae.encode(x_BD, Pursuit()).values)
