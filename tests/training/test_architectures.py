"""Train every architecture on a tiny stream, interrupt, resume, save and load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kronsae.cli.lists import architecture
from kronsae.core import checkpoint
from kronsae.core.losses import MatryoshkaConfig
from kronsae.core.metrics import explained_variance
from kronsae.core.objective import AuxKConfig
from kronsae.runs.architectures import ARCHITECTURES, SAE_KINDS, batch_topk, jumprelu, matryoshka, switch
from kronsae.runs.parsing import parse_sae
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig
from kronsae.training.member import Member, side_by_side
from kronsae.training.sparsity import SparsityConfig, SparsityController

D_IN, BATCH, STEPS = 16, 128, 40
CELLS = pytest.mark.parametrize("name", ARCHITECTURES)


def batch(seed: int, tokens: int = BATCH) -> Tensor:
    """Return sparse sums of 60 fixed directions with a nonzero mean."""
    directions = torch.randn(60, D_IN, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    on = torch.rand(tokens, 60, generator=generator) < 0.05
    return (on * torch.rand(tokens, 60, generator=generator)) @ directions + 5


def at_hooks(hooks: Sequence[str], seed: int, tokens: int = BATCH) -> dict[str, Tensor]:
    """Return the same directions for every hook, each with its own rotation."""
    x_BD = batch(seed, tokens)
    turns = (torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(n)) for n in range(len(hooks)))
    return {hook: x_BD @ torch.linalg.qr(turn).Q for hook, turn in zip(hooks, turns, strict=True)}


def small(name: str) -> MemberConfig:
    """Return the architecture's ``--sae`` string with all sizes divided by 8."""
    smaller = {"d_sae": "128", "num_heads": "16", "k": "4", "smallest": "16", "num_experts": "4"}
    kind, *words = ARCHITECTURES[name].split()
    pairs = [word.split("=") for word in words]
    member = parse_sae(" ".join([kind, *(f"{key}={smaller.get(key, value)}" for key, value in pairs), "lr=5e-3"]))
    return replace(member, aux_k=AuxKConfig(dead_after_tokens=5 * BATCH))


def train(member: Member, start: int = 0, stop: int = STEPS) -> Member:
    for step in range(start, stop):
        member.step_on(at_hooks(member.hooks, step), step, want_metrics=False)
    return member


@CELLS
def test_a_cell_learns_and_is_saved_as_it_is(name: str, tmp_path: Path) -> None:
    member = Member(small(name), D_IN, "h", STEPS)
    held_out = at_hooks(member.hooks, 1000, 500)
    x_BD, target_BO = side_by_side(held_out, member.reads), side_by_side(held_out, member.writes)
    train(member, 0, 2)
    before = explained_variance(target_BO, member.finished_sae()(x_BD))
    train(member, 2)
    sae = member.finished_sae()
    after = explained_variance(target_BO, sae(x_BD))
    assert after > max(before, 0.2)
    cell = name.removesuffix("-kron")
    assert sae.config.role == (cell if cell.endswith("coder") else "")
    again = checkpoint.load(checkpoint.save(sae, tmp_path))
    assert torch.equal(again(x_BD), sae(x_BD))
    assert torch.equal(again.encode(x_BD).to_dense(), sae.encode(x_BD).to_dense())
    saved_as = "jumprelu" if sae.config.sparsifier.kind == "batch_topk" else sae.config.sparsifier.kind
    assert again.config.sparsifier.kind == saved_as
    assert "sparsity" not in json.loads((tmp_path / "cfg.json").read_text())["sae"]
    for token in (0, 7):  # no token's codes depend on the batch it comes in
        torch.testing.assert_close(again(x_BD[token : token + 1]), again(x_BD)[token : token + 1], rtol=1e-4, atol=1e-4)


@CELLS
def test_a_cell_carries_on_with_the_same_bits(name: str) -> None:
    whole = train(Member(small(name), D_IN, "h", STEPS), 0, 12)
    first = train(Member(small(name), D_IN, "h", STEPS), 0, 5)
    second = Member(replace(small(name), seed=9), D_IN, "h", STEPS)
    second.load_state({key: value.clone() for key, value in first.state().items()})
    train(second, 5, 12)
    for key, value in whole.state().items():
        assert key == "seconds" or torch.equal(value, second.state()[key]), key


def test_the_list_of_cells_is_the_table() -> None:
    rows = [architecture(name, words) for name, words in ARCHITECTURES.items()]
    parts = ("role", "encoder", "sparsifier", "loss", "experts")
    assert len(rows) == len({tuple(row[part] for part in parts) for row in rows}) == 16
    for dense, kron in zip(rows[::2], rows[1::2], strict=True):
        assert (dense["encoder"], kron["encoder"]) == ("dense", "kronecker")
        others = [part for part in parts if part != "encoder"]
        assert [dense[part] for part in others] == [kron[part] for part in others]
        assert parse_sae(dense["sae"]).encoder.d_sae == parse_sae(kron["sae"]).encoder.d_sae == 1024
        assert dense["train"] == f"kronsae train --recipe tiny --sae '{dense['sae']}' --out runs/{dense['name']}"


def test_words_reach_the_configs() -> None:
    heads: dict[str, Any] = {"num_heads": 8, "d_base": 2, "d_extension": 4}
    loss = matryoshka(k=2, groups=(8, 56), **heads).loss
    assert loss == MatryoshkaConfig(groups=(8, 56))
    assert matryoshka(k=2, d_sae=64).loss == MatryoshkaConfig(groups=(8, 8, 16, 32))
    assert matryoshka(k=2, d_sae=64, across_batch=True).sparsifier.kind == "batch_topk"
    assert jumprelu(k=2, d_sae=64, coefficient=0.5).sparsity == SparsityConfig(coefficient=0.5)
    assert switch(k=2, num_experts=4, **heads).encoder.d_sae == 64
    assert switch(k=2, num_experts=4, d_sae=64, d_base=2, d_extension=4) == switch(k=2, num_experts=4, **heads)


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_every_function_passes_on_what_all_have_in_common(kind: str) -> None:
    common: dict[str, Any] = {"name": "n", "lr": 0.5, "seed": 3, "init_norm": 0.25, "unit_norm_decoder": False}
    common |= {"normalize_activations": "none", "dead_after_tokens": 7, "aux_weight": 0.125}
    common |= {"read": "a, b", "write": ("c",), "skip": True}
    shape: dict[str, Any] = {"d_sae": 64} if kind == "topk" else {"num_heads": 8, "d_base": 2, "d_extension": 4}
    member = SAE_KINDS[kind](k=2, **shape, **common)
    encoder: Any = getattr(member.encoder, "expert", member.encoder)
    aux_k = member.aux_k
    found = (member.name, member.optimizer.lr, member.seed, encoder.init_norm, member.unit_norm_decoder)
    assert found == ("n", 0.5, 3, 0.25, False)
    assert (member.normalize_activations, aux_k.dead_after_tokens, aux_k.weight) == ("none", 7, 0.125)
    assert (member.read, member.write, member.skip) == (("a", "b"), ("c",), True)


@pytest.mark.parametrize("kind", [kind for kind in SAE_KINDS if kind != "topk"])
def test_activations_are_normalised_where_the_gate_lets_them(kind: str) -> None:
    for gate, expected in (("mand", "center_and_scale"), ("mand_eps", "none")):
        made = SAE_KINDS[kind](k=2, num_heads=8, d_base=2, d_extension=4, gate=gate)
        assert made.normalize_activations == expected


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (batch_topk, {"k": 2}, "d_sae (for a dense encoder) or num_heads, d_base and d_extension (for a Kronecker one"),
        (
            batch_topk,
            {"k": 2, "num_heads": 4},
            "d_base, d_extension and num_heads (or d_sae) must be given for a Kronecker encoder; got num_heads.",
        ),
        (
            batch_topk,
            {"k": 2, "d_sae": 64, "d_base": 4},
            "d_base, d_extension and num_heads (or d_sae) must be given for a Kronecker encoder; got d_base.",
        ),
        (
            batch_topk,
            {"k": 2, "d_sae": 66, "d_base": 4, "d_extension": 4},
            "without num_heads, d_sae must be a multiple of d_base * d_extension; got 66 with 4 * 4 = 16. Change one.",
        ),
        (
            jumprelu,
            {"k": 2, "d_sae": 64, "gate": "relu_product"},
            "gate 'relu_product' must be used with a Kronecker encoder; got a dense one.",
        ),
        (
            jumprelu,
            {"k": 2, "d_sae": 64, "null_symbols": True},
            "null_symbols must be used with a Kronecker encoder; got a dense one. Leave it out, or give num_heads,",
        ),
        (
            jumprelu,
            {"k": 2, "d_sae": 64, "d_base": 2, "d_extension": 4, "null_symbols": True},
            "without num_heads, d_sae must be a multiple of (d_base + 1) * (d_extension + 1) - 1, because of "
            "null_symbols; got 64 with 3 * 5 - 1 = 14. Change one.",
        ),
        (
            matryoshka,
            {"k": 2, "d_sae": 64, "smallest": 8, "groups": (64,)},
            "smallest and groups must not be given together; got both.",
        ),
        (switch, {"k": 2, "d_sae": 66}, "d_sae must be a multiple of num_experts; got 66 with num_experts=8."),
        (jumprelu, {"k": 2, "d_sae": 66, "coefficient": -1.0}, "sparsity.coefficient must be finite and at least 0"),
    ],
)
def test_refusals(make: Any, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make(**words)
    assert str(error.value).startswith(message)


# --- the weight of l0 ---


def test_a_fixed_coefficient_warms_up_linearly() -> None:
    controller = SparsityController(SparsityConfig(coefficient=2.0, warmup_share=0.5), target=4)
    assert [controller.coefficient(step, 8) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    controller.update(torch.tensor(100.0), torch.tensor(1.0))
    assert controller.coefficient(7, 8) == 2.0


def test_a_steered_coefficient_rises_while_l0_is_above_its_target_and_scales_with_the_loss() -> None:
    one, other = (SparsityController(SparsityConfig(), target=4) for _ in range(2))
    assert one.coefficient(0, 8) == 0.0
    last = 0.0
    for step in range(5):
        one.update(torch.tensor(5.0), torch.tensor(1.0))
        other.update(torch.tensor(5.0), torch.tensor(10.0))
        assert one.coefficient(step, 8) > last
        assert other.coefficient(step, 8) == pytest.approx(10 * one.coefficient(step, 8))
        last = one.coefficient(step, 8)
    one.update(torch.tensor(3.0), torch.tensor(1.0))
    assert one.coefficient(6, 8) < last


@pytest.mark.parametrize("encoder", [{"d_sae": 256}, {"num_heads": 32, "d_base": 2, "d_extension": 4}], ids=str)
@pytest.mark.parametrize("k", [4, 8])
def test_l0_lands_within_two_percent_of_its_target(encoder: dict[str, Any], k: int) -> None:
    member = Member(jumprelu(k=k, lr=5e-3, **encoder), D_IN, "h", 150)
    for step in range(150):
        member.step(batch(step, 512), step, want_metrics=False)
    l0 = float(member.finished_sae().encode(batch(10_000, 8192)).l0())
    assert l0 == pytest.approx(k, rel=0.02)


def test_thresholds_settle_on_the_target_at_the_end() -> None:
    controller = SparsityController(SparsityConfig(), 32)
    l0 = torch.tensor(40.0)
    assert controller.threshold_factor(l0, 84, 100) == 1
    assert controller.threshold_factor(l0, 85, 100) == pytest.approx((40 / 32) ** 0.1)
    assert controller.threshold_factor(torch.tensor(0.0), 99, 100) == 1
    assert SparsityController(SparsityConfig(coefficient=1.0), 32).threshold_factor(l0, 99, 100) == 1
