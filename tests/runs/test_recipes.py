"""Recipes are complete configs, and the paper's recipes have the paper's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.runs.config import RunConfig
from kronsae.runs.recipes import RECIPES, SAE_KINDS, describe, kron, quickstart, short_run_lr, shortened, topk
from kronsae.runs.run import execute
from kronsae.support.config import from_dict, to_dict
from kronsae.support.errors import UserError
from kronsae.training.config import OptimizerConfig


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_whole_config_that_can_be_written_and_read(name: str) -> None:
    config = RECIPES[name]()
    assert from_dict(RunConfig, to_dict(config)) == config
    assert config.loop.steps >= 100
    assert config.buffer_tokens % config.loop.batch_tokens == 0, "a remainder of the buffer would be thrown away"
    assert describe(RECIPES[name]).endswith((".", "tests and demonstrations."))


@pytest.mark.parametrize("name", [name for name in RECIPES if len(RECIPES[name]().saes) > 1])
def test_what_is_compared_has_equal_dictionaries_and_a_smaller_kronecker_encoder(name: str) -> None:
    base, kronecker = RECIPES[name]().saes
    assert (base.name, kronecker.name) == ("topk", "kron")
    assert base.encoder.d_sae == kronecker.encoder.d_sae
    assert base.sparsifier == kronecker.sparsifier
    assert (base.optimizer, base.aux_k, base.seed) == (kronecker.optimizer, kronecker.aux_k, kronecker.seed)
    assert kronecker.encoder.multiply_adds(512) < base.encoder.multiply_adds(512)


def test_a_short_try_is_short() -> None:
    whole = quickstart()
    short = shortened(whole, 7000)
    assert (short.loop.tokens, short.loop.batch_tokens, short.loop.steps) == (7000, 2048, 3)
    assert (short.window_pool_tokens, short.buffer_tokens, short.eval_tokens) == (28_000, 2048, 7000)
    assert shortened(whole, 100).window_pool_tokens == whole.model_batch * whole.context_length
    assert shortened(whole, 100_000).buffer_tokens == 25_000
    assert shortened(whole, 100).loop.batch_tokens == 100
    longer = shortened(whole, 10_000_000)
    assert (longer.buffer_tokens, longer.eval_tokens) == (whole.buffer_tokens, whole.eval_tokens)
    assert longer.window_pool_tokens == whole.pool_tokens
    assert short.saes == whole.saes
    with pytest.raises(UserError, match=r"^tokens must be a whole number above 0; got 0\.$"):
        shortened(whole, 0)


def test_quickstart_keeps_its_promise_of_sparsity() -> None:
    config = RECIPES["quickstart"]()
    assert [member.sparsifier.k for member in config.saes] == [32, 32]
    assert (config.model.name, config.text.source) == ("bundled", "bundled")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("paper-")])
def test_the_paper_s_runs(name: str) -> None:
    """arXiv 2505.22255: F = 2^15, k = 50, M = 2, N = 4, 125M tokens of FineWeb-Edu in batches of 8192, AdamW."""
    config = RECIPES[name]()
    assert [(member.encoder.d_sae, member.sparsifier.k) for member in config.saes] == [(2**15, 50), (2**15, 50)]
    assert to_dict(config.saes[1].encoder) == {
        "kind": "kronecker",
        "num_heads": 4096,
        "d_base": 2,
        "d_extension": 4,
        "d_sae": 2**15,
        "gate": "mand",
        "init_norm": None,
        "null_symbols": False,
    }
    assert (config.loop.tokens, config.loop.batch_tokens) == (125_000_000, 8192)
    assert config.text.source == "HuggingFaceFW/fineweb-edu"
    assert config.saes[0].optimizer == OptimizerConfig(
        lr=8e-4, final_lr=1e-6, warmup_share=0.1, beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=1.0
    )


def test_the_words_of_an_sae_reach_its_config() -> None:
    one = topk(
        d_sae=8,
        k=2,
        name="n",
        lr=1.0,
        seed=3,
        init_norm=0.5,
        unit_norm_decoder=False,
        dead_after_tokens=7,
        aux_weight=0.25,
    )
    assert (one.name, one.seed, one.unit_norm_decoder) == ("n", 3, False)
    assert one.optimizer.lr == 1.0
    assert isinstance(one.encoder, DenseEncoderConfig)
    assert one.encoder.init_norm == 0.5
    assert (one.aux_k.dead_after_tokens, one.aux_k.weight) == (7, 0.25)
    two = kron(num_heads=2, d_base=3, d_extension=4, k=2, gate="mand_eps", d_sae=24)
    assert (two.encoder.d_sae, two.name, two.encoder.kind) == (24, "kron", "kronecker")
    assert (SAE_KINDS["topk"], SAE_KINDS["kron"]) == (topk, kron)


def test_tiny_on_the_bundled_model(tmp_path: Path) -> None:
    """Train on the recipe's first batches; the whole recipe takes most of a minute."""
    config = RECIPES["tiny"]()
    short = replace(config, loop=replace(config.loop, tokens=2048), buffer_tokens=2048)
    run = execute(short, tmp_path / "r", show_progress=False)
    assert run.load("kron").d_sae == config.saes[0].encoder.d_sae
    assert [row["tokens"] for row in run.metrics()] == [2048]


def test_the_rate_of_a_short_run_falls_with_the_root_of_the_size() -> None:
    assert short_run_lr(4096) == pytest.approx(0.7 / 64)
    assert {member.optimizer.lr for member in quickstart().saes} == {short_run_lr(4096)}
