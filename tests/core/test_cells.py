"""Every cell of the comparison against its definition: all F latents, masks, a dense decoder, plain autograd, float64.

Encoder, sparsifier and loss are crossed, not listed: a combination that nobody named has to hold as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronsae import kernels
from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GATES
from kronsae.core.losses import LossConfig, MatryoshkaConfig, SquaredErrorConfig, squared_error
from kronsae.core.objective import AuxKConfig, objective
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLU, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.kernels import Above, BatchChoice

K, F, D_IN, TOKENS = 3, 24, 5, 30
L0_WEIGHT, AUX_WEIGHT = 0.3, 0.5
DEAD_C = torch.tensor([1, 7, 8, 23])

KRON = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3)
HALF_KRON = KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=3)
ENCODERS: dict[str, AnyEncoderConfig] = {
    "dense": DenseEncoderConfig(d_sae=F),
    "kron": KRON,
    # no minimum: its cells are tied, and which of them are kept is anyone's choice
    "kron, power_mean": KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3, gate="power_mean"),
    "kron, raw_product": KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3, gate="raw_product"),
    "kron, null symbols": KroneckerEncoderConfig(num_heads=3, d_base=2, d_extension=2, null_symbols=True),
    "kron (1, 1), null symbols": KroneckerEncoderConfig(num_heads=8, d_base=1, d_extension=1, null_symbols=True),
    "trunk": TrunkEncoderConfig(trunk=DenseEncoderConfig(d_sae=F // 2), heads=HALF_KRON),
    "trunk, null symbols": TrunkEncoderConfig(
        trunk=DenseEncoderConfig(d_sae=F // 3),
        heads=KroneckerEncoderConfig(num_heads=2, d_base=2, d_extension=2, null_symbols=True),
    ),
    "switch": SwitchEncoderConfig(num_experts=2, expert=DenseEncoderConfig(d_sae=F // 2)),
    "switch, kron": SwitchEncoderConfig(num_experts=2, expert=HALF_KRON),
    "switch, kron, null symbols": SwitchEncoderConfig(
        num_experts=2, expert=KroneckerEncoderConfig(num_heads=4, d_base=1, d_extension=1, null_symbols=True)
    ),
}
SPARSIFIERS: dict[str, SparsifierConfig] = {
    "topk": TopKConfig(k=K),
    "batch_topk": BatchTopKConfig(k=K),
    "jumprelu": JumpReLUConfig(k=K),
}
LOSSES: dict[str, LossConfig] = {
    "squared_error": SquaredErrorConfig(),
    "matryoshka": MatryoshkaConfig(groups=(6, 6, 12)),
}
CELLS = [
    (encoder, sparsifier)
    for encoder in ENCODERS
    for sparsifier in SPARSIFIERS
    if sparsifier == "topk" or not encoder.startswith("switch")
]


def build(encoder: AnyEncoderConfig, sparsifier: SparsifierConfig, seed: int = 0) -> SAE:
    sae = SAEConfig(d_in=D_IN, encoder=encoder, sparsifier=sparsifier).build(seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*sae.encoder.parameters(), *sae.decoder.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if isinstance(sae.sparsifier, JumpReLU):
        objective(sae, inputs(seed))  # starts the thresholds
        with torch.no_grad():
            sae.sparsifier.log_threshold.add_(torch.randn(F, generator=generator), alpha=0.3)
    return sae


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def largest(z_BF: Tensor, k: int) -> Tensor:
    return torch.zeros_like(z_BF).scatter(1, z_BF.topk(k, dim=1).indices, 1.0)


def defined_activations(sae: SAE, z_BF: Tensor) -> tuple[Tensor, Tensor | None]:
    """f, and l0 with the estimator's derivative where the sparsifier learns from it."""
    config = sae.config.sparsifier
    if isinstance(config, TopKConfig):
        return z_BF * largest(z_BF, config.k), None
    if isinstance(config, BatchTopKConfig):
        kept = largest(z_BF.reshape(1, -1), config.k * len(z_BF)).view_as(z_BF)
        return z_BF * kept, None
    assert isinstance(sae.sparsifier, JumpReLU)
    log_threshold_F = sae.sparsifier.log_threshold
    threshold_F = log_threshold_F.exp().detach()
    rectangle_BF = ((z_BF - threshold_F).abs() < config.bandwidth * threshold_F / 2).double()
    moved_F = log_threshold_F - log_threshold_F.detach()  # 0, with the derivative of the logarithm of the threshold
    on_BF = (z_BF > threshold_F).double()
    f_BF = z_BF * on_BF - threshold_F / config.bandwidth * rectangle_BF * moved_F
    l0 = (on_BF - rectangle_BF / config.bandwidth * moved_F).sum(1).mean()
    return f_BF, l0


def defined_penalty(sae: SAE, x_BD: Tensor) -> Tensor:
    config = sae.config.encoder
    if not isinstance(config, SwitchEncoderConfig):
        return x_BD.new_zeros(())
    weights = dict(sae.encoder.named_parameters())
    p_BE = (x_BD @ weights["W_router"].T + weights["b_router"]).softmax(1)
    share_E = torch.stack([(p_BE.argmax(1) == e).double().mean() for e in range(config.num_experts)])
    return config.balance_weight * config.num_experts * (share_E * p_BE.mean(0)).sum()


def defined_loss(sae: SAE, x_BD: Tensor, loss: LossConfig) -> Tensor:
    z_BF = sae.encoder(x_BD).materialize()
    f_BF, l0 = defined_activations(sae, z_BF)
    ends = [F] if isinstance(loss, SquaredErrorConfig) else [6, 12, 24]
    total = torch.stack([
        squared_error(x_BD, f_BF[:, :end] @ sae.W_dec[:end] + sae.b_dec) for end in ends
    ]).sum()  # fmt: skip
    residual_BD = (x_BD - (f_BF @ sae.W_dec + sae.b_dec)).detach()
    dead_BF = torch.zeros_like(z_BF)
    dead_BF[:, DEAD_C] = z_BF[:, DEAD_C] * largest(z_BF[:, DEAD_C], 2)
    total = total + AUX_WEIGHT * squared_error(residual_BD, dead_BF @ sae.W_dec)
    if l0 is not None:
        total = total + L0_WEIGHT * l0
    return total + defined_penalty(sae, x_BD)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("encoder", "sparsifier"), CELLS)
@pytest.mark.parametrize("path", ["portable", "fastest"])
def test_loss_and_every_gradient_are_the_definition_s(path: str, encoder: str, sparsifier: str, loss: str) -> None:
    sae, x_BD = build(ENCODERS[encoder], SPARSIFIERS[sparsifier]), inputs().requires_grad_()
    names = dict(sae.named_parameters()) | {"x": x_BD}
    expected = defined_loss(sae, x_BD, LOSSES[loss])
    gradients = torch.autograd.grad(expected, list(names.values()))

    def found() -> Tensor:
        aux_k = AuxKConfig(weight=AUX_WEIGHT, k_aux=2)
        return objective(sae, x_BD, DEAD_C, aux_k, LOSSES[loss], L0_WEIGHT).loss

    if path == "portable":
        with kernels.use("portable"):
            total = found()
            total.backward()
    else:
        total = found()
        total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=0)
    for (name, tensor), gradient in zip(names.items(), gradients, strict=True):
        assert tensor.grad is not None, name
        assert gradient.count_nonzero() > 0, name
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-9, atol=1e-10, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if not name.startswith("switch")])
@pytest.mark.parametrize("sparsifier", ["batch_topk", "jumprelu"])
def test_in_use_every_latent_above_its_threshold_is_on(encoder: str, sparsifier: str) -> None:
    sae, x_BD = build(ENCODERS[encoder], SPARSIFIERS[sparsifier]), inputs()
    sae.sparsifier.choose_in_training(sae.encoder(x_BD))
    z_BF = sae.encoder(x_BD).materialize()
    threshold_F = sae.state_dict()["sparsifier.log_threshold"].exp().expand(F)
    expected = torch.where(z_BF > threshold_F, z_BF, 0.0)
    # the smallest latent kept by BatchTopK is the threshold itself: on or off by the rounding of a logarithm
    decided = (z_BF / threshold_F - 1).abs() > 1e-9
    torch.testing.assert_close(sae.encode(x_BD).to_dense() * decided, expected * decided)
    assert torch.equal(sae.trained().encode(x_BD).to_dense(), sae.encode(x_BD).to_dense())


# without mand_eps: a batch's best are positive products, and an inactive pair's 0.00316 is no activation
SHAPES: list[EncoderConfig] = [
    DenseEncoderConfig(d_sae=40),
    *(KroneckerEncoderConfig(num_heads=h, d_base=m, d_extension=n, gate=gate)  # type: ignore[arg-type]
      for gate in sorted(GATES.keys() - {"mand_eps"}) for h, m, n in ((6, 2, 3), (1, 3, 4), (7, 1, 1))),
    *(KroneckerEncoderConfig(num_heads=h, d_base=m, d_extension=n, null_symbols=True)
      for h, m, n in ((6, 2, 3), (1, 3, 4), (7, 1, 1))),
]  # fmt: skip


@pytest.mark.parametrize("tiny_chunks", [False, True], ids=["one chunk", "many chunks"])
@given(shape=st.sampled_from(SHAPES), tokens=st.integers(1, 9), total=st.integers(1, 80), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
def test_requests_of_a_batch_and_of_thresholds(
    tiny_chunks: bool, shape: EncoderConfig, tokens: int, total: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae = SAEConfig(d_in=D_IN, encoder=shape, sparsifier=TopKConfig(k=1)).build(seed).double()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.randn(sae.encoder.weight.shape, generator=generator))
    x_BD = torch.randn(tokens, D_IN, generator=generator, dtype=torch.float64)
    thresholds_F = torch.rand(shape.d_sae, generator=generator, dtype=torch.float64)
    latents = sae.encoder(x_BD)
    z_BF = latents.materialize().detach()
    with pytest.MonkeyPatch.context() as patch:
        if tiny_chunks:
            patch.setattr(kernels.requests, "CHUNK_ELEMENTS", 8)
            patch.setattr(kernels.portable, "PRODUCT_ELEMENTS", 8)
        batch, above = latents.choose(BatchChoice(total), Above(thresholds_F))
    torch.testing.assert_close(above.to_dense(), torch.where(z_BF > thresholds_F, z_BF, 0.0))
    assert int(batch.active.sum()) == min(total, int((z_BF > 0).sum()))
    kept = batch.to_dense()
    torch.testing.assert_close(kept, torch.where(kept > 0, z_BF, 0.0))
    assert (kept > 0).sum() == batch.active.sum(), "no latent of a token is chosen twice"
    if (kept > 0).any():
        left_out = z_BF[kept == 0].max() if (kept == 0).any() else torch.zeros(())
        assert kept[kept > 0].min() >= left_out * (1 - 1e-12)
    for codes in (batch, above):
        assert codes.values.shape[1] == max(1, int(codes.active.sum(1).max()))


def test_a_token_meets_its_own_expert_only() -> None:
    sae, x_BD = build(ENCODERS["switch, kron"], TopKConfig(k=F // 2)), inputs()
    codes = sae.encode(x_BD).to_dense()
    weights = dict(sae.encoder.named_parameters())
    for token, x_D in enumerate(x_BD):
        p_E = (weights["W_router"] @ x_D + weights["b_router"]).softmax(0)
        expert = int(p_E.argmax())
        own_F = sae.encoder.experts[expert](x_D.unsqueeze(0)).materialize()[0]  # type: ignore[operator, index]
        expected_F = torch.zeros(F, dtype=torch.float64)
        expected_F[expert * F // 2 : (expert + 1) * F // 2] = own_F * p_E[expert]
        torch.testing.assert_close(codes[token], expected_F.detach(), check_dtype=True)
    assert len({int(row.argmax()) // (F // 2) for row in codes}) == 2, "both experts are met"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SAEConfig(d_in=4, encoder=ENCODERS["switch"], sparsifier=BatchTopKConfig(k=2)),
            "sparsifier must be 'topk' with a switch encoder; got 'batch_topk'.",
        ),
        (
            lambda: SAEConfig(d_in=4, encoder=ENCODERS["switch"], sparsifier=TopKConfig(k=13)),
            "k must be at most the latents of one expert; got k=13 with the latents of one expert=12. "
            "Lower k or widen.",
        ),
        (lambda: BatchTopKConfig(k=1, threshold_decay=1.0), "threshold_decay must be in [0, 1); got 1.0."),
        (lambda: JumpReLUConfig(k=1, bandwidth=2.0), "bandwidth must be between 0 and 2; got 2.0."),
        (
            lambda: SwitchEncoderConfig(num_experts=2, expert=KRON, balance_weight=-1.0),
            "balance_weight must be finite and at least 0; got -1.0.",
        ),
        (
            lambda: SwitchEncoderConfig(num_experts=1_000_000, expert=KRON),
            "num_experts must be at most 4,096; got 1,000,000. Take fewer and larger experts; 8 is usual.",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole text is compared
        make()
    assert str(error.value) == message
