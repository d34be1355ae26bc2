"""Test that a member's step equals that of plain PyTorch and does not depend on other members."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.normalization import Normalization
from kronsae.runs.recipes import kron, topk
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig, MemberConfig, OptimizerConfig
from kronsae.training.member import Diverged, Member, learning_rate
from kronsae.training.trainer import fit

D_IN = 12
BATCH = 24
STEPS = 8
DEAD_AFTER = 3 * BATCH
CONFIGS = {
    "topk": topk(d_sae=48, k=3, dead_after_tokens=DEAD_AFTER, normalize_activations="none"),
    "kron": kron(num_heads=6, d_base=2, d_extension=4, k=3, dead_after_tokens=DEAD_AFTER, normalize_activations="none"),
}


def batches(number: int = STEPS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, D_IN, generator=generator, dtype=dtype) * 3 for _ in range(number)]


def stream(number: int = STEPS) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    for index, batch in enumerate(batches(number)):
        yield {"h": batch}, {"batch": index + 1}


def make(config: MemberConfig, **changes: Any) -> Member:
    return Member(replace(config, **changes), D_IN, "h", STEPS)


class Reference:
    """Reference training: all latents materialised, gradients by autograd, torch's AdamW."""

    def __init__(self, member: Member) -> None:
        self.config = member.config
        self.weights = {name: value.detach().clone().requires_grad_() for name, value in member.sae.named_parameters()}
        settings = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self.unseen_F = torch.zeros(member.sae.d_sae, dtype=torch.int64)
        self.auxiliary_steps = 0

    def latents(self, x_BD: Tensor) -> Tensor:
        weight, bias = self.weights["encoder.weight"], self.weights["encoder.bias"]
        if isinstance(self.config.encoder, DenseEncoderConfig):
            return (x_BD @ weight.T + bias).relu()
        assert isinstance(self.config.encoder, KroneckerEncoderConfig)
        pre_BHP = torch.einsum("bd,hpd->bhp", x_BD, weight) + bias
        bases = self.config.encoder.d_base
        u, v = pre_BHP[..., :bases, None], pre_BHP[..., None, bases:]
        on = (u > 0) & (v > 0)
        return torch.where(on, torch.where(on, u * v, 1.0).sqrt(), 0.0).flatten(1)

    def step(self, x_BD: Tensor, step: int) -> tuple[float, float]:
        """Return the loss and the gradient norm before clipping."""
        config, settings = self.config, self.config.optimizer
        W_dec, b_dec = self.weights["decoder.W_dec"], self.weights["decoder.b_dec"]
        z_BF = self.latents(x_BD)
        f_BF = z_BF * kept(z_BF, config.sparsifier.k)
        x_hat_BD = f_BF @ W_dec + b_dec
        loss = (x_BD - x_hat_BD).square().sum(-1).mean()
        dead_C = (self.unseen_F >= config.aux_k.dead_after_tokens).nonzero().squeeze(1)
        if len(dead_C):
            self.auxiliary_steps += 1
            dead_BC = z_BF[:, dead_C]
            dead_BC = dead_BC * kept(dead_BC, min(D_IN // 2, len(dead_C)))
            residual_BD = (x_BD - x_hat_BD).detach()
            loss = loss + config.aux_k.weight * (residual_BD - dead_BC @ W_dec[dead_C]).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.weights.values(), math.inf if settings.clip_norm is None else settings.clip_norm
        )
        self.optimizer.param_groups[0]["lr"] = learning_rate(settings, step, STEPS)
        self.optimizer.step()
        if config.unit_norm_decoder:
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.unseen_F += len(x_BD)
        self.unseen_F[(f_BF > 0).any(0)] = 0
        return loss.item(), norm.item()


def kept(z_BF: Tensor, k: int) -> Tensor:
    """1 at the k largest of each row."""
    return torch.zeros_like(z_BF).scatter(1, z_BF.topk(k, dim=1).indices, 1.0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": OptimizerConfig(lr=1e-2, clip_norm=None, weight_decay=0.1)},
        {"optimizer": OptimizerConfig(lr=1e-2, clip_norm=0.05, warmup_share=0.5), "unit_norm_decoder": False},
    ],
    ids=["default", "unclipped", "free norms"],
)
def test_a_step_is_the_reference_step(name: str, changes: dict[str, Any]) -> None:
    member = make(CONFIGS[name], **changes)
    member.sae.double()
    reference = Reference(member)
    for step, x_BD in enumerate(batches(dtype=torch.float64)):
        metrics = member.step(x_BD, step, want_metrics=True)
        loss, norm = reference.step(x_BD, step)
        assert metrics is not None
        assert metrics.loss == pytest.approx(loss, rel=1e-10)
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-10)
        for key, value in member.sae.state_dict().items():
            torch.testing.assert_close(value, reference.weights[key].detach(), rtol=1e-9, atol=1e-11, msg=key)
        assert torch.equal(member.dead.tokens_since_active_F, reference.unseen_F)
    assert 0 < reference.auxiliary_steps < STEPS


def test_metrics_are_computed_when_wanted_and_change_nothing() -> None:
    silent, telling = make(CONFIGS["kron"]), make(CONFIGS["kron"])
    for step, x_BD in enumerate(batches(3)):
        assert silent.step(x_BD, step, want_metrics=False) is None
        assert telling.step(x_BD, step, want_metrics=True) is not None
    for one, other in zip(silent.sae.parameters(), telling.sae.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_metrics_of_a_step() -> None:
    member = make(CONFIGS["topk"])
    for step, x_BD in enumerate(batches()):
        metrics = member.step(x_BD, step, want_metrics=True)
    assert metrics is not None
    assert 0 < metrics.l0 <= 3
    assert metrics.explained_variance < 1
    assert metrics.dead_share == len(member.dead.dead(DEAD_AFTER)) / 48
    assert metrics.auxiliary_loss > 0
    assert metrics.lr == pytest.approx(1e-6)
    assert metrics.member_seconds == member.seconds > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_members_do_not_feel_each_other(name: str) -> None:
    """Another SAE on the same stream, before or after this one, does not change one bit of it."""
    other = next(config for key, config in CONFIGS.items() if key != name)
    alone, before, after = make(CONFIGS[name]), make(CONFIGS[name]), make(CONFIGS[name])
    loop = LoopConfig(tokens=STEPS * BATCH, batch_tokens=BATCH)
    for group in ([alone], [make(other), before], [after, make(other), make(other, name="third", seed=3)]):
        fit(group, stream(), loop)
    for key, value in alone.state().items():
        if key != "seconds":
            assert torch.equal(value, before.state()[key]), key
            assert torch.equal(value, after.state()[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_carries_everything(name: str) -> None:
    whole, first, second = make(CONFIGS[name]), make(CONFIGS[name]), make(CONFIGS[name], seed=5)
    for step, x_BD in enumerate(batches()):
        whole.step(x_BD, step, want_metrics=False)
        (first if step < 4 else second).step(x_BD, step, want_metrics=False)
        if step == 3:
            second.load_state({key: value.clone() for key, value in first.state().items()})
    for key, value in whole.state().items():
        assert key == "seconds" or torch.equal(value, second.state()[key]), key


def test_a_state_is_taken_up_as_a_copy() -> None:
    first, second = make(CONFIGS["topk"]), make(CONFIGS["topk"])
    first.step(batches(1)[0], 0, want_metrics=False)
    second.load_state(first.state())
    kept = {key: value.clone() for key, value in first.state().items()}
    second.step(batches(2)[1], 1, want_metrics=False)
    assert all(torch.equal(value, kept[key]) for key, value in first.state().items())


def test_the_state_of_another_sae_is_refused() -> None:
    state = make(CONFIGS["topk"]).state()
    with pytest.raises(UserError, match=r"^the state of 'kron' is missing or misshapen in the checkpoint \(sae\."):
        make(CONFIGS["kron"]).load_state(state)
    del state["seconds"]
    with pytest.raises(UserError, match=r"\(seconds\)\.$"):
        make(CONFIGS["topk"]).load_state(state)


@pytest.mark.parametrize("lost", ["optimizer.decoder.W_dec.step", "optimizer.encoder.bias.exp_avg_sq"])
def test_a_state_without_all_of_the_optimiser_is_refused(lost: str) -> None:
    """Otherwise Adam would start with empty moments and the resumed run would have other bits."""
    first = make(CONFIGS["kron"])
    first.step(batches(1)[0], 0, want_metrics=False)
    state = first.state()
    del state[lost]
    with pytest.raises(UserError, match=rf"^the state of 'kron' is missing or misshapen .* \({lost}\)\.$"):
        make(CONFIGS["kron"]).load_state(state)


def test_a_state_before_the_first_step_can_be_taken_up() -> None:
    fresh, whole = make(CONFIGS["topk"], seed=4), make(CONFIGS["topk"])
    fresh.load_state(make(CONFIGS["topk"]).state())
    for member in (fresh, whole):
        member.step(batches(1)[0], 0, want_metrics=False)
    assert all(key == "seconds" or torch.equal(value, fresh.state()[key]) for key, value in whole.state().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_divergence_is_told_and_names_the_remedy(name: str) -> None:
    member = make(CONFIGS[name], optimizer=OptimizerConfig(lr=1e30, warmup_share=0.0), unit_norm_decoder=False)
    with pytest.raises(Diverged) as caught:
        [member.step(x_BD, step, want_metrics=True) for step, x_BD in enumerate(batches())]
    message = str(caught.value)
    assert caught.value.member == name
    assert message.startswith(f"training of '{name}' diverged: the ")
    assert "Lower its learning rate (now " in message


@pytest.mark.parametrize("name", CONFIGS)
def test_normalising_is_training_on_normalised_activations(name: str) -> None:
    """Raw activations into one member, activations normalised by hand into another: the same bits, before folding."""
    member, by_hand = make(CONFIGS[name], normalize_activations="center_and_scale"), make(CONFIGS[name])
    raw = [20 * x_BD + 7 for x_BD in batches()]
    normalization = Normalization.of(raw[0])
    for step, x_BD in enumerate(raw):
        member.step(x_BD, step, want_metrics=False)
        by_hand.step(normalization(x_BD), step, want_metrics=False)
    for key, value in member.sae.state_dict().items():
        assert torch.equal(value, by_hand.sae.state_dict()[key]), key
    x_hat_BD = normalization.scale * by_hand.sae(normalization(raw[-1])) + normalization.mean_D
    torch.testing.assert_close(member.finished_sae()(raw[-1]), x_hat_BD, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_hand.finished_sae()(raw[-1]), by_hand.sae(raw[-1]))


@pytest.mark.parametrize(
    ("read", "write", "skip"),
    [
        (("a",), ("b",), False),
        (("a",), ("b",), True),
        (("a", "b"), None, False),
        (("a", "b"), ("b", "c"), True),
    ],
    ids=["transcoder", "skip transcoder", "crosscoder", "skip crosscoder"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_hook_is_normalised_alone_and_that_is_folded(
    name: str, read: tuple[str, ...], write: tuple[str, ...] | None, skip: bool
) -> None:
    """Training at raw hooks is training at hooks that were normalised one by one before."""
    places: dict[str, Any] = {"read": read, "write": write, "skip": skip}
    scaled = make(CONFIGS[name], normalize_activations="center_and_scale", **places)
    by_hand = make(CONFIGS[name], **places)
    raw = [{"a": 20 * x_BD + 7, "b": x_BD.roll(1, 1) * 0.1 - 3, "c": x_BD.roll(2, 1) + x_BD} for x_BD in batches()]
    normalizations = {hook: Normalization.of(x_BD) for hook, x_BD in raw[0].items()}
    for step, batch in enumerate(raw):
        scaled.step_on(batch, step, want_metrics=False)
        metrics = by_hand.step_on({hook: normalizations[hook](x) for hook, x in batch.items()}, step, True)
    for key, value in scaled.sae.state_dict().items():
        assert torch.equal(value, by_hand.sae.state_dict()[key]), key
    if by_hand.sae.skip is not None:
        assert by_hand.sae.skip.W_skip.count_nonzero() > 0
    assert metrics is not None
    assert math.isfinite(metrics.explained_variance)
    last = raw[-1]
    x_BD = torch.cat([normalizations[hook](last[hook]) for hook in read], dim=1)
    parts = by_hand.sae(x_BD).split(D_IN, dim=1)
    written = [normalizations[hook] for hook in write or read]
    expected = [n.scale * part_BD + n.mean_D for n, part_BD in zip(written, parts, strict=True)]
    found_BO = scaled.finished_sae()(torch.cat([last[hook] for hook in read], dim=1))
    torch.testing.assert_close(found_BO, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-3)


def test_normalization_is_part_of_the_state() -> None:
    config = replace(CONFIGS["kron"], normalize_activations="center_and_scale")
    member, resumed = make(config), make(config)
    x_BD = 20 * batches()[0] + 7
    member.step(x_BD, 0, want_metrics=False)
    resumed.load_state(member.state())
    for each in (member, resumed):
        each.step(x_BD + 100, 1, want_metrics=False)
    for key, value in member.state().items():
        assert key == "seconds" or torch.equal(value, resumed.state()[key]), key
