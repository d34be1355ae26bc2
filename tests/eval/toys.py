"""A language model small enough to work its losses out by hand, and SAEs whose reconstruction is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.data.model import HookPoint, LanguageModel

PADDING, BOS = 0, 1


class ToyModel(nn.Module):
    """Embedding, a block that is hooked, a head: token t alone decides the logits of t + 1."""

    def __init__(self, embedding_VD: Tensor, head_VD: Tensor, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(embedding_VD.shape[0], embedding_VD.shape[1], _weight=embedding_VD, _freeze=True)
        self.block = _Block(as_tuple=as_tuple)
        self.unused = nn.Identity()
        self.head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False)
        self.head.weight = nn.Parameter(head_VD, requires_grad=False)
        self.passes_to_the_end = 0

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert input_ids.shape == attention_mask.shape
        hidden = self.block(self.embedding(input_ids))
        logits = self.head(hidden[0] if isinstance(hidden, tuple) else hidden)
        self.passes_to_the_end += 1
        return SimpleNamespace(logits=logits)


class _Block(nn.Module):
    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Tensor) -> Any:
        return (x, "cache") if self.as_tuple else x


class ToyTokenizer:
    """Token n is the word ``tn``."""

    all_special_ids = (PADDING, BOS)

    def convert_ids_to_tokens(self, token: int) -> str:
        return {PADDING: "<pad>", BOS: "<bos>"}.get(token, f" t{token}")


@dataclass(frozen=True, eq=False)
class ToyLanguageModel(LanguageModel):
    """A `LanguageModel` of a toy, which need not be named."""

    model: Any
    name: str = field(default="toy", kw_only=True)
    tokenizer: Any = field(default_factory=ToyTokenizer, kw_only=True)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"), kw_only=True)
    no_lm_head_reason: str = field(default="", kw_only=True)
    max_positions: int | None = field(default=None, kw_only=True)


ToyHook = HookPoint


@dataclass(frozen=True, eq=False)
class ToyBatch:
    input_ids_ST: Tensor
    attention_mask_ST: Tensor
    keep_ST: Tensor


def language_model(
    vocabulary: int, width: int, *, as_tuple: bool = False, reason: str = ""
) -> tuple[ToyLanguageModel, ToyHook]:
    """A random one, in whole numbers: sums of them are exact, so that no order of summation can be seen."""
    generator = torch.Generator().manual_seed(0)
    embedding, head = torch.randn(2, vocabulary, width, generator=generator).mul(2).round()
    model = ToyModel(embedding, head, as_tuple=as_tuple)
    return ToyLanguageModel(model, no_lm_head_reason=reason), ToyHook("block", model.block)


def batches(windows: Sequence[Sequence[int]], size: int) -> Callable[[], Iterable[tuple[ToyBatch, None]]]:
    """Makes a stream of the windows, ``size`` at a time, padded to the longest of each batch."""

    def make() -> Iterable[tuple[ToyBatch, None]]:
        for start in range(0, len(windows), size):
            rows = windows[start : start + size]
            ids = torch.full((len(rows), max(map(len, rows))), PADDING)
            for row, window in enumerate(rows):
                ids[row, : len(window)] = torch.tensor(window)
            mask = torch.tensor([[int(t < len(window)) for t in range(ids.shape[1])] for window in rows])
            yield ToyBatch(ids, mask, mask.bool() & (ids > BOS)), None

    return make


def random_windows(number: int, length: int, vocabulary: int) -> list[list[int]]:
    """Windows of varying length, each with ``BOS`` in front."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, length, (number,), generator=generator).tolist()
    return [[BOS, *torch.randint(2, vocabulary, (n,), generator=generator).tolist()] for n in lengths]


@torch.no_grad()
def perfect_sae(width: int) -> SAE:
    """``x = relu(x) - relu(-x)``: one latent for each sign of each coordinate."""
    shape = DenseEncoderConfig(d_sae=2 * width)
    sae = SAEConfig(d_in=width, encoder=shape, sparsifier=TopKConfig(k=2 * width)).build()
    signs = torch.cat([torch.eye(width), -torch.eye(width)])
    sae.encoder.weight.copy_(signs)
    sae.decoder.W_dec.copy_(signs)
    return sae


@torch.no_grad()
def zero_sae(width: int) -> SAE:
    """Reconstructs everything as 0."""
    sae = perfect_sae(width)
    sae.decoder.W_dec.zero_()
    return sae


@torch.no_grad()
def kron_sae(
    width: int, num_heads: int = 6, d_base: int = 2, d_extension: int = 3, k: int = 4, *, null_symbols: bool = False
) -> SAE:
    """A random KronSAE, its encoder in whole numbers."""
    shape = KroneckerEncoderConfig(
        num_heads=num_heads, d_base=d_base, d_extension=d_extension, init_norm=4.0, null_symbols=null_symbols
    )
    sae = SAEConfig(d_in=width, encoder=shape, sparsifier=TopKConfig(k=k)).build(seed=3)
    sae.encoder.weight.round_()
    return sae
