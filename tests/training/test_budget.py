"""A budget in tokens or FLOPs, as steps of each SAE; a group whose members stop at different steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.core.flops import training_flops
from kronsae.core.sae import SAEConfig
from kronsae.runs.architectures import kron, topk
from kronsae.support.errors import UserError
from kronsae.training.budget import member_steps
from kronsae.training.config import LoopConfig
from kronsae.training.member import Member
from kronsae.training.state import load_members, newest_checkpoint
from kronsae.training.trainer import fit

D_IN, BATCH = 8, 16
CONFIGS = {"topk": topk(d_sae=32, k=2), "kron": kron(num_heads=4, d_base=2, d_extension=4, k=2)}
SHAPES = {name: config.shape(D_IN) for name, config in CONFIGS.items()}
# Multiply-adds per token by hand (paper, eq. 7): D*F + K*D = 8*32 + 2*8, and D*H*(M+N) + H*M*N + K*D = 8*4*6 + 32 + 16
MULTIPLY_ADDS = {"topk": 272, "kron": 240}


def test_the_same_tokens_for_all() -> None:
    assert member_steps(LoopConfig(tokens=100, batch_tokens=BATCH), SHAPES) == {"topk": 6, "kron": 6}


def test_the_same_flops_as_a_reference() -> None:
    """Topk's 30 batches cost 6 * 272 * 480 FLOPs; for as many, kron trains on 480 * 272 / 240 = 544 tokens."""
    loop = LoopConfig(tokens=30 * BATCH + 3, same_flops_as="topk", batch_tokens=BATCH)
    assert member_steps(loop, SHAPES) == {"topk": 30, "kron": 34}
    back = LoopConfig(tokens=34 * BATCH, same_flops_as="kron", batch_tokens=BATCH)
    assert member_steps(back, SHAPES) == {"topk": 30, "kron": 34}


def test_a_budget_in_flops() -> None:
    for name, multiply_adds in MULTIPLY_ADDS.items():
        assert training_flops(SHAPES[name], 1) == 6 * multiply_adds
    steps = member_steps(LoopConfig(flops=6 * 272 * BATCH * 10, batch_tokens=BATCH), SHAPES)
    assert steps == {"topk": 10, "kron": 11}
    exact = member_steps(LoopConfig(flops=6 * 272 * BATCH * 10 - 1, batch_tokens=BATCH), SHAPES)
    assert exact["topk"] == 9


def test_a_large_budget_is_exact() -> None:
    wide: dict[str, SAEConfig] = {"topk": topk(d_sae=2**17, k=50).shape(2048)}
    loop = LoopConfig(tokens=2_000_000_000, same_flops_as="topk")
    assert member_steps(loop, wide) == {"topk": 2_000_000_000 // 8192}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "the budget must be either tokens or flops; got tokens=None, flops=None."),
        ({"tokens": 16, "flops": 1e9}, "the budget must be either tokens or flops; got tokens=16, flops=1000"),
        (
            {"flops": 1e9, "same_flops_as": "topk"},
            "same_flops_as must be used with tokens, the budget of the SAE that it n",
        ),
        ({"flops": -1.0}, "flops must be above 0; got -1.0."),
        (
            {"flops": 25_000.0},
            "the budget must give every SAE at least one batch; got 2.5e+04 FLOPs, but one of batch_tokens=",
        ),
        ({"tokens": 64, "same_flops_as": "tpok"}, "same_flops_as must name an SAE of the run: topk, kron; got 'tpok'."),
    ],
)
def test_a_budget_that_cannot_work(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        member_steps(LoopConfig(batch_tokens=BATCH, **budget), SHAPES)
    assert str(caught.value).startswith(message)


def test_a_budget_in_flops_has_no_steps_of_its_own() -> None:
    with pytest.raises(
        UserError, match=r"^steps differ between SAEs for a budget in flops; call member_steps instead\.$"
    ):
        _ = LoopConfig(flops=1e9).steps


# --- members that stop at different steps ---


def stream(first: int = 0) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    for index in itertools.count(first):
        generator = torch.Generator().manual_seed(index)
        yield {"h": torch.randn(BATCH, D_IN, generator=generator)}, {"batch": index + 1}


def members() -> list[Member]:
    return [Member(CONFIGS["topk"], D_IN, "h", 4), Member(CONFIGS["kron"], D_IN, "h", 9)]


class Memory:
    """A sink that records which SAE wrote at which step."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, float]] = []

    def write(self, row: Any) -> None:
        self.rows.append((row["sae"], row["step"], row["lr"]))

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


LOOP = LoopConfig(tokens=9 * BATCH, batch_tokens=BATCH, log_every=3, checkpoint_every=2)


def assert_same(one: Member, other: Member) -> None:
    for key, value in one.state().items():
        assert key == "seconds" or torch.equal(value, other.state()[key]), key


def test_each_stops_at_its_own_step_with_its_own_schedule() -> None:
    group, sink = members(), Memory()
    progress = fit(group, stream(), LOOP, [sink])
    assert (progress.step, progress.tokens) == (9, 9 * BATCH)
    assert [(name, step) for name, step, _ in sink.rows] == [
        ("topk", 3),
        ("kron", 3),
        ("topk", 4),
        ("kron", 6),
        ("kron", 9),
    ]
    last = {name: lr for name, _, lr in sink.rows}
    assert last == {"topk": pytest.approx(1e-6), "kron": pytest.approx(1e-6)}
    for member in members():
        alone = [member]
        fit(alone, stream(), LOOP)
        assert_same(member, next(one for one in group if one.name == member.name))


@pytest.mark.parametrize("stop_after", range(1, 9))
def test_stopped_anywhere_and_carried_on(stop_after: int, tmp_path: Path) -> None:
    whole, group, again = members(), members(), members()
    fit(whole, stream(), LOOP)
    answers = iter([False] * stop_after + [True])
    fit(group, stream(), LOOP, (), tmp_path, should_stop=lambda: next(answers))
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    assert saved.progress.step == stop_after
    load_members(saved, again)
    fit(again, stream(stop_after), LOOP, (), tmp_path, saved.progress)
    for one, other in zip(whole, again, strict=True):
        assert_same(one, other)
