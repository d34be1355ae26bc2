"""Tiny randomly initialised models of six architectures, saved like any Hugging Face model."""

from __future__ import annotations

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
