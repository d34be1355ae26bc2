"""Hooks in both directions."""

from __future__ import annotations

import pytest

from kronsae.interop.hook_names import FAMILIES, family_of, from_transformer_lens, hub_name, to_transformer_lens

PAIRS = [
    ("gpt2", "layers.6", "blocks.6.hook_resid_post"),
    ("gpt2", "layers.0:input", "blocks.0.hook_resid_pre"),
    ("gpt2", "layers.3.attn", "blocks.3.hook_attn_out"),
    ("gpt2", "layers.3.attn.c_proj:input", "blocks.3.attn.hook_z"),
    ("gpt2", "transformer.wte", "hook_embed"),
    ("gpt_neox", "layers.11.mlp", "blocks.11.hook_mlp_out"),
    ("gpt_neox", "layers.11.mlp:input", "blocks.11.mlp.hook_in"),
    ("gpt_neox", "layers.1.attention", "blocks.1.hook_attn_out"),
    ("gpt_neox", "layers.1.attention.dense:input", "blocks.1.attn.hook_z"),
    ("llama", "layers.2.self_attn", "blocks.2.hook_attn_out"),
    ("llama", "layers.2.self_attn.o_proj:input", "blocks.2.attn.hook_z"),
    ("llama", "model.embed_tokens", "hook_embed"),
    ("gemma2", "layers.4.post_attention_layernorm", "blocks.4.hook_attn_out"),
    ("gemma2", "layers.4.post_feedforward_layernorm", "blocks.4.hook_mlp_out"),
]


@pytest.mark.parametrize(("family", "ours", "theirs"), PAIRS)
def test_a_hook_has_a_name_in_both(family: str, ours: str, theirs: str) -> None:
    assert to_transformer_lens(ours, FAMILIES[family]) == theirs
    assert from_transformer_lens(theirs, FAMILIES[family]) == ours


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("6", "blocks.6.hook_resid_post"),
        ("transformer.h.6", "blocks.6.hook_resid_post"),
        ("encoder.layer.6", "blocks.6.hook_resid_post"),
        ("layers.6.mlp:input", "blocks.6.mlp.hook_in"),
    ],
)
def test_without_a_family_names_common_to_all_are_known(ours: str, theirs: str) -> None:
    assert to_transformer_lens(ours) == theirs


def test_an_mlp_whose_output_is_normed_again_has_no_name() -> None:
    assert to_transformer_lens("layers.4.mlp", FAMILIES["gemma2"]) == "layers.4.mlp"


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "blocks.6.hook_mlp_in",
        "blocks.6.ln2.hook_normalized",
        "layers.2.input_layernorm",
        "blocks.x.hook_z",
        "",
    ],
)
def test_other_names_are_kept(name: str) -> None:
    assert from_transformer_lens(name, FAMILIES["llama"]) == name
    assert to_transformer_lens(name, FAMILIES["llama"]) == name


def test_a_name_that_depends_on_the_family_is_kept_without_one() -> None:
    assert from_transformer_lens("blocks.2.hook_attn_out") == "blocks.2.hook_attn_out"
    assert from_transformer_lens("blocks.2.hook_mlp_out") == "blocks.2.hook_mlp_out"
    for ours in ("gpt_neox.layers.6.mlp", "layers.6.mlp:output", "layers.6.self_attn", "layers.6.attn.c_proj:input"):
        assert to_transformer_lens(ours) == ours


@pytest.mark.parametrize(
    ("model_type", "model", "family"),
    [
        ("qwen2", None, "llama"),
        ("gemma3_text", None, "gemma2"),
        (None, "google/gemma-2-2b", "gemma2"),
        (None, "google/gemma-2b", "llama"),
        (None, "EleutherAI/pythia-160m", "gpt_neox"),
        (None, "models/pythia-160m/", "gpt_neox"),
        (None, "gpt2-small", "gpt2"),
    ],
)
def test_the_family_of_a_model(model_type: str | None, model: str | None, family: str) -> None:
    assert family_of(model_type, model) == FAMILIES[family]


def test_an_unknown_model_has_no_family() -> None:
    assert family_of("mamba", "gpt2") is None
    assert family_of(None, None) is None


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2-medium", "gpt2-medium"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gemma-2b", "google/gemma-2b"),
        ("gemma-2-9b", "google/gemma-2-9b"),
        ("models/pythia-70m", "models/pythia-70m"),
        ("other", "other"),
    ],
)
def test_the_names_of_transformer_lens_on_the_hub(alias: str, name: str) -> None:
    assert hub_name(alias) == name
