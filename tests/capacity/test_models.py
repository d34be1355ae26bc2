"""Shapes of language models: the table compared with transformers, config files compared with loaded models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import KINDS, LAYERS, VOCABULARY, WIDTH

from kronsae.capacity.models import KNOWN_MODELS, GivenShape, find_model, hook_widths, known_model, whole
from kronsae.data.model import ModelConfig, load_model
from kronsae.runs.memory import model_bytes
from kronsae.support.errors import UserError

FolderOf = Callable[[str], Path]


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the config of each known model: type, heads, key-value heads, width of the MLP, and what is unusual."""

    def sizes(name: str, kind: str, heads: int, shared: int, mlp: int, **more: Any) -> tuple[str, dict[str, Any]]:
        known = KNOWN_MODELS[name]
        keys: dict[str, Any] = {
            "model_type": kind,
            "hidden_size": known.d_in,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "intermediate_size": mlp,
            "vocab_size": known.vocabulary,
            "tie_word_embeddings": known.tied,
        }
        return name, keys | more

    yield sizes("smollm2", "llama", 9, 3, 1536)
    for name, heads in (("gpt2", 12), ("gpt2-xl", 25)):
        known = KNOWN_MODELS[name]
        yield name, {"model_type": "gpt2", "n_embd": known.d_in, "n_head": heads, "vocab_size": known.vocabulary}
    for name in (name for name in KNOWN_MODELS if name.startswith("pythia")):
        yield sizes(name, "gpt_neox", 8, 8, 4 * KNOWN_MODELS[name].d_in)
    yield sizes("gemma-2-2b", "gemma2", 8, 4, 9216, head_dim=256)
    yield sizes("gemma-2-9b", "gemma2", 16, 8, 14336, head_dim=256)
    yield sizes("gemma-2-27b", "gemma2", 32, 16, 36864, head_dim=128)
    yield sizes("qwen2.5-0.5b", "qwen2", 14, 2, 4864)
    yield sizes("qwen2.5-1.5b", "qwen2", 12, 2, 8960)
    yield sizes("qwen2.5-7b", "qwen2", 28, 4, 18944)
    yield sizes("qwen2.5-72b", "qwen2", 64, 8, 29568)
    yield sizes("mistral-7b-v0.1", "mistral", 32, 8, 14336)
    yield sizes("llama-3.2-1b", "llama", 32, 8, 8192)
    yield sizes("llama-3.2-3b", "llama", 24, 8, 8192)
    yield sizes("llama-3.1-8b", "llama", 32, 8, 14336)
    yield sizes("llama-3.1-70b", "llama", 64, 8, 28672)


def count(config: dict[str, Any], layers: int) -> int:
    """Return the parameters of a model with fewer layers, built without values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    key = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {key: layers}))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "config"), [pytest.param(*pair, id=pair[0]) for pair in configs()])
def test_the_table_has_transformers_counts(name: str, config: dict[str, Any]) -> None:
    one, two = count(config, 1), count(config, 2)
    assert KNOWN_MODELS[name].parameters == one + (KNOWN_MODELS[name].layers - 1) * (two - one)


def test_every_known_model_is_counted() -> None:
    assert {name for name, _ in configs()} == set(KNOWN_MODELS)


def test_names() -> None:
    assert known_model("meta-llama/Llama-3.1-70B-Instruct") == KNOWN_MODELS["llama-3.1-70b"]
    assert known_model("EleutherAI/pythia-160m-deduped") == KNOWN_MODELS["pythia-160m"]
    assert known_model("google/gemma-2-2b-it") == KNOWN_MODELS["gemma-2-2b"]
    assert known_model("nobody/model") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_file_gives_the_sizes_of_the_loaded_model(kind: str, tiny_model_folder: FolderOf) -> None:
    config = ModelConfig(name=str(tiny_model_folder(kind)))
    found, loaded = find_model(config), load_model(config).model
    assert (found.d_in, found.layers) == (WIDTH, LAYERS)
    assert found.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert found.weights_bytes == model_bytes(loaded)
    assert found.embedding_parameters in (VOCABULARY * WIDTH, 2 * VOCABULARY * WIDTH)
    assert found.embedding_parameters < found.parameters


def test_sizes_by_hand() -> None:
    """2 tied and untied embeddings; the rest divided by the layers."""
    tied = find_model(ModelConfig(name="gpt2", dtype="bfloat16"))
    assert tied.weights_bytes == 2 * 124_439_808
    assert tied.layer_parameters == (124_439_808 - 50_257 * 768) / 12
    untied = find_model(ModelConfig(name="pythia-70m"))
    assert untied.weights_bytes == 4 * 70_426_624
    assert untied.layer_parameters == (70_426_624 - 2 * 50_304 * 512) / 6
    given = GivenShape(d_in=8, layers=2, parameters=1000, vocabulary=10)
    own = find_model(ModelConfig(name="mine"), given)
    assert (own.d_in, own.layers, own.layer_parameters, own.weights_bytes) == (8, 2, (1000 - 80) / 2, 4000)
    assert own.source == "given"
    changed = find_model(ModelConfig(name="gpt2"), GivenShape(layers=6))
    assert (changed.layers, changed.d_in, changed.source) == (6, 768, "table of known models; given: layers")


def test_layers_that_run() -> None:
    model = find_model(ModelConfig(name="gpt2"))
    assert model.layers_run(["layers.0"]) == 1
    assert model.layers_run(["transformer.h.3.mlp:input", "layers.5"]) == 6
    assert model.layers_run(["11"]) == 12
    assert model.layers_run(["transformer.ln_f"]) == 12
    with pytest.raises(UserError) as caught:
        model.layers_run(["layers.12"])
    assert str(caught.value) == ("hook must name a layer from 0 to 11; got 'layers.12'. The model has 12 layers.")


def test_widths_of_hooks() -> None:
    model = find_model(ModelConfig(name="gpt2"))
    stream = ["3", "layers.3", "layers.3.mlp", "layers.3.mlp:input", "model.layers.3.self_attn", "transformer.h.3.attn"]
    assert hook_widths(model, stream, None) == dict.fromkeys(stream, 768)
    with pytest.raises(UserError) as caught:
        hook_widths(model, ["layers.3.mlp.act"], None)
    assert str(caught.value) == (
        "hook must be a block, its MLP or its attention, whose width is the model's, or --d-in must be given; got "
        "'layers.3.mlp.act'."
    )
    assert hook_widths(model, ["layers.3.mlp.act"], 3072) == {"layers.3.mlp.act": 3072}


def test_whole_numbers() -> None:
    assert (whole(70e9), whole(None), whole(1.5)) == (70_000_000_000, None, 1.5)
    assert isinstance(whole(70e9), int)
    assert whole(float("inf")) == float("inf")


def test_refusals() -> None:
    with pytest.raises(UserError) as caught:
        find_model(ModelConfig(name="org/lama-3.1-70b"))
    message = str(caught.value)
    assert message.startswith(
        "model must be a known one, a folder with a config.json, or described by --d-in, --layers and --parameters; "
        "got 'org/lama-3.1-70b'. Did you mean 'llama-3.1-70b'? Known: smollm2, gpt2, "
    )
    with pytest.raises(UserError, match=r"^parameters must be more than the 38,597,376 of the embedding; got 5,000\."):
        find_model(ModelConfig(name="gpt2"), GivenShape(parameters=5000))
    with pytest.raises(UserError, match=r"^layers must be a whole number above 0; got 0\.$"):
        GivenShape(layers=0)
