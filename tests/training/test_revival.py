"""Test that only the dead parts of an encoder are reinitialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.core.sparsifiers import JumpReLU
from kronsae.runs.architectures import jumprelu, kron, switch, topk
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig
from kronsae.training.member import Member
from kronsae.training.revival import SCALE, revive

SHAPES: dict[str, Any] = {
    "dense": lambda **words: topk(d_sae=12, k=2, **words),
    "kronecker": lambda **words: kron(num_heads=2, d_base=2, d_extension=3, k=2, **words),
    "null symbols": lambda **words: kron(num_heads=4, d_base=1, d_extension=1, k=2, null_symbols=True, **words),
}


def stepped(config: MemberConfig, steps: int = 3) -> tuple[Member, Tensor]:
    torch.manual_seed(0)
    member = Member(config, 8, "hook", 10)
    x_BD = torch.randn(64, 8)
    for step in range(steps):
        member.step(x_BD, step, want_metrics=False)
    return member, x_BD


@pytest.mark.parametrize(
    ("kind", "dead", "rows", "latents"),
    [
        ("dense", [3, 7], {3, 7}, {3, 7}),
        # head 0: base 1 (cells 3, 4, 5) is dead and no extension is; head 1: extension 0 (cells 6, 9) and a lone cell
        ("kronecker", [3, 4, 5, 6, 9, 8], {1, 7}, {3, 4, 5, 6, 9}),
        ("kronecker", [0], set(), set()),
        # cells of a head: the pair, the base alone, the extension alone; head 1 has a dead base, head 3 is dead
        ("null symbols", [0, 3, 4, 9, 10, 11], {2, 6, 7}, {3, 4, 9, 10, 11}),
    ],
)
def test_only_rows_without_a_living_latent_start_anew(
    kind: str, dead: list[int], rows: set[int], latents: set[int]
) -> None:
    member, x_BD = stepped(SHAPES[kind]())
    sae, optimizer = member.sae, member.optimizer
    encoder = sae.encoder
    assert isinstance(encoder.weight, Tensor)
    before = encoder.weight.detach().clone().view(-1, 8), sae.W_dec.detach().clone()
    dead_F = torch.zeros(12, dtype=torch.bool)
    dead_F[dead] = True
    token = torch.zeros(64, 8)
    token[5] = torch.arange(8.0) + 1  # all of the residual is at one token
    found = revive(sae, optimizer, dead_F, x_BD, x_BD - token, torch.Generator().manual_seed(0))
    weight = encoder.weight.detach().view(-1, 8)
    assert {int(row) for row in (weight != before[0]).any(1).nonzero()} == rows
    assert {int(row) for row in (sae.W_dec != before[1]).any(1).nonzero()} == latents
    assert set(found.latents_C.tolist()) == latents
    assert found.rows == len(rows)
    living = before[0][[row for row in range(len(weight)) if row not in rows]]
    for row in rows:
        torch.testing.assert_close(weight[row], token[5] / token[5].norm() * living.norm(dim=1).mean() * SCALE)
        assert optimizer.state[encoder.weight]["exp_avg"].view(-1, 8)[row].abs().max() == 0
        assert optimizer.state[encoder.weight]["exp_avg_sq"].view(-1, 8)[row].abs().max() == 0
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))


def test_a_threshold_out_of_reach_starts_anew_too() -> None:
    member, x_BD = stepped(jumprelu(d_sae=12, k=4))
    sparsifier = member.sae.sparsifier
    assert isinstance(sparsifier, JumpReLU)
    dead_F = torch.zeros(12, dtype=torch.bool)
    dead_F[[3, 7]] = True
    with torch.no_grad():
        sparsifier.log_threshold[dead_F] = 50.0  # no activation comes near exp(50)
    before = sparsifier.log_threshold.detach().clone()
    revive(member.sae, member.optimizer, dead_F, x_BD, x_BD * 0, torch.Generator().manual_seed(0))
    assert torch.equal(sparsifier.log_threshold[~dead_F], before[~dead_F])
    torch.testing.assert_close(sparsifier.log_threshold[dead_F], before[~dead_F].mean().expand(2))
    assert member.optimizer.state[sparsifier.log_threshold]["exp_avg"][dead_F].abs().max() == 0
    assert member.sae.encode(x_BD).to_dense()[:, dead_F].any(0).all()


def test_with_all_dead_nothing_is_known_to_start_from() -> None:
    member, x_BD = stepped(SHAPES["dense"]())
    before = {name: tensor.clone() for name, tensor in member.state().items()}
    found = revive(member.sae, member.optimizer, torch.ones(12, dtype=torch.bool), x_BD, x_BD * 0, torch.Generator())
    assert found.rows == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in member.state().items())


@pytest.mark.parametrize("kind", SHAPES)
def test_in_training_it_happens_when_due_and_repeats_to_the_bit(kind: str) -> None:
    rare: dict[str, Any] = {"dead_after_tokens": 64, "aux_weight": 0.0}
    heads: dict[str, Any] = {"num_heads": 32, "d_base": 1, "d_extension": 3, "null_symbols": kind == "null symbols"}
    words = topk(d_sae=96, k=1, **rare) if kind == "dense" else kron(k=1, **heads, **rare)
    with_revival = MemberConfig(**{**vars(words), "revive_every_tokens": 128})
    plain, _ = stepped(words, 4)
    first, _ = stepped(with_revival, 4)
    again, _ = stepped(with_revival, 4)
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in first.state().items() if name != "seconds")
    early_plain, _ = stepped(words, 1)
    early, _ = stepped(with_revival, 1)
    assert torch.equal(early.sae.W_dec, early_plain.sae.W_dec)
    assert not torch.equal(first.sae.W_dec, plain.sae.W_dec)


def test_where_it_cannot_be_it_is_refused() -> None:
    words = switch(d_sae=16, num_experts=2, k=2)
    with pytest.raises(
        UserError, match=r"^revive_every_tokens must be used with dense or Kronecker SAEs .*; 'switch' is not one\."
    ):
        MemberConfig(**{**vars(words), "revive_every_tokens": 128})
    with pytest.raises(UserError, match="revive_every_tokens must be a whole number above 0; got 0"):
        MemberConfig(**{**vars(topk(d_sae=16, k=2)), "revive_every_tokens": 0})
