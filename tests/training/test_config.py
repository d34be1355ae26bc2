"""Test that training configs reject invalid values and that the learning rate follows its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.support.errors import UserError
from kronsae.training.config import LoopConfig, MemberConfig, OptimizerConfig
from kronsae.training.member import learning_rate
from kronsae.training.sparsity import SparsityConfig


def member(**changes: Any) -> MemberConfig:
    known: dict[str, Any] = {"name": "a", "encoder": DenseEncoderConfig(d_sae=8), "sparsifier": TopKConfig(k=2)}
    return MemberConfig(**(known | changes))


def test_the_learning_rate_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, final_lr=0.1, warmup_share=0.4)
    # 2 of 5 steps rise; then the cosine falls from 1 to 0.1 over three, with its middle at the mean of the two
    assert [learning_rate(config, step, 5) for step in range(5)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_the_paper_s_schedule() -> None:
    config, steps = OptimizerConfig(), 1000
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(8e-4 / 100)
    assert rates[99] == max(rates) == 8e-4
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[550] == pytest.approx(1e-6 + (8e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 450 / 899)))


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_few_steps_have_a_rate_above_0(steps: int) -> None:
    rates = [learning_rate(OptimizerConfig(), step, steps) for step in range(steps)]
    assert all(0 < rate <= 8e-4 for rate in rates)
    assert rates[0] == 8e-4 or steps > 4


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert learning_rate(OptimizerConfig(warmup_share=0.0), 0, 100) == 8e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(lr=0.0), "optimizer.lr must be above 0; got 0.0."),
        (lambda: OptimizerConfig(lr=math.nan), "optimizer.lr must be above 0; got nan."),
        (lambda: OptimizerConfig(lr=math.inf), "optimizer.lr must be finite; got inf."),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps must be above 0; got 0.0."),
        (lambda: OptimizerConfig(clip_norm=-1.0), "optimizer.clip_norm must be above 0; got -1.0."),
        (lambda: OptimizerConfig(clip_norm=math.inf), "optimizer.clip_norm must be finite; got inf."),
        (lambda: OptimizerConfig(warmup_share=1.0), "optimizer.warmup_share must be in [0, 1); got 1.0."),
        (lambda: OptimizerConfig(beta2=math.nan), "optimizer.beta2 must be in [0, 1); got nan."),
        (lambda: OptimizerConfig(final_lr=-1.0), "optimizer.final_lr must be finite and at least 0; got -1.0."),
        (
            lambda: OptimizerConfig(weight_decay=math.nan),
            "optimizer.weight_decay must be finite and at least 0; got nan.",
        ),
        (
            lambda: member(name="../x"),
            "name must be letters, digits, '.', '_' or '-', because it names a folder; got '../x'.",
        ),
        (
            lambda: member(name=".."),
            "name must be letters, digits, '.', '_' or '-', because it names a folder; got '..'.",
        ),
        (lambda: member(seed=-1), "seed must be from 0 to 2**63 - 1; got -1."),
        (
            lambda: member(sparsifier=TopKConfig(k=9)),
            "k must be at most d_sae; got k=9 with d_sae=8. Lower k or widen.",
        ),
        (
            lambda: member(sparsity=SparsityConfig(coefficient=0.5)),
            "sparsity must be used with the sparsifier 'jumprelu'; got SparsityConfig(coefficient=0.5, "
            "warmup_share=0.1, threshold_lr_scale=10.0) with 'topk' in 'a'. Leave it out.",
        ),
        (lambda: LoopConfig(tokens=0), "tokens must be a whole number above 0; got 0."),
        (lambda: LoopConfig(tokens=1e6), "tokens must be a whole number above 0; got 1000000.0."),  # type: ignore[arg-type]
        (lambda: LoopConfig(tokens=9, log_every=0), "log_every must be a whole number above 0; got 0."),
        (
            lambda: LoopConfig(tokens=100, batch_tokens=101),
            "tokens must be at least one batch; got tokens=100 with batch_tokens=101. "
            "Ask for more tokens or smaller batches.",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message


def test_tokens_are_rounded_down_to_whole_batches() -> None:
    assert LoopConfig(tokens=100, batch_tokens=30).steps == 3


def test_without_clipping() -> None:
    assert OptimizerConfig(clip_norm=None).clip_norm is None


def test_a_member_knows_its_sae_once_the_width_is_known() -> None:
    assert member().shape(4).d_in == 4


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({}, "layers.1"),
        ({"read": ("layers.2",)}, "layers.2"),
        ({"read": ("layers.2",), "write": ("layers.2",)}, "layers.2"),
        ({"write": ("layers.2",)}, None),
        ({"read": ("layers.1", "layers.2")}, None),
    ],
)
def test_the_one_hook_that_is_reconstructed(hooks: dict[str, tuple[str, ...]], expected: str | None) -> None:
    encoder, sparsifier = DenseEncoderConfig(d_sae=8), TopKConfig(k=2)
    member = MemberConfig(name="a", encoder=encoder, sparsifier=sparsifier, **hooks)  # type: ignore[arg-type]
    assert member.reconstructs("layers.1") == expected
    assert (member.shape(4, "layers.1").role == "") == (expected is not None)
