"""Estimates of memory: of an SAE in training, and of a language model and a pass of it. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kronsae.core.sae import SAEConfig, count_parameters
from kronsae.kernels.portable import PRODUCT_ELEMENTS
from kronsae.training.config import MemberConfig

PARAMETER_BYTES = 4
"""Bytes of a weight, of a gradient in dense form and of each of Adam's two moments: float32."""

MODEL_WORK = 16
"""Approximate number of vectors of the model's width that one transformer layer holds per token at a time: residual
stream, its norm, the attention's queries, keys, values and output, and the two or three wider vectors of the MLP."""


@dataclass(frozen=True, kw_only=True)
class SAEBytes:
    """Memory of one SAE in training, by part, in bytes.

    Args:
        parameters: number of parameters; not a size.
        weights, moments: weights and Adam's two moments.
        gradients: gradients in dense form; 0 if they stay lists of entries, which `codes` includes.
        vectors: vectors as wide as x and the target: normalised, reconstruction, residual, their gradients and copies.
        codes: index, value, pre-latents and gradients of the selected latents and of AuxK's.
        product: outputs of a chunk of the encoder's product.
    """

    parameters: int
    weights: int
    moments: int
    gradients: int
    vectors: int
    codes: int
    product: int

    @property
    def state(self) -> int:
        """Memory that the SAE holds all the time."""
        return self.weights + self.moments + self.gradients

    @property
    def work(self) -> int:
        """Further memory of a step."""
        return self.vectors + self.codes + self.product

    @property
    def copy(self) -> int:
        """The copy of the weights that is saved."""
        return self.weights


def sae_bytes(shape: SAEConfig, batch_tokens: int, k_aux: int, *, dense_gradients: bool) -> SAEBytes:
    """Return an estimate of the memory of one SAE in training.

    Weights, gradients and each moment take 4 bytes per parameter. A step on B tokens takes ``4 * 4 B (D + O)`` bytes of
    vectors, ``4 * 8 B (K + k_aux)`` of codes, and a chunk of the encoder's product. BatchTopK needs the pre-latents of
    the whole batch at once, JumpReLU those of the first batch.

    Args:
        shape: the SAE, or the part of it that a device holds.
        batch_tokens: B.
        k_aux: latents of AuxK per token; 0 without AuxK.
        dense_gradients: whether the optimiser needs them as tensors of the weights' shapes (`DENSE_GRADIENTS`).
    """
    parameters = parameters_of(shape)
    rows = max(1, shape.encoder.multiply_adds(shape.d_in) // shape.d_in)
    product = max(min(batch_tokens * rows, PRODUCT_ELEMENTS), 64 * rows)
    if shape.sparsifier.kind in ("batch_topk", "jumprelu"):
        product = max(product, batch_tokens * rows)
    return SAEBytes(
        parameters=parameters,
        weights=PARAMETER_BYTES * parameters,
        moments=2 * PARAMETER_BYTES * parameters,
        gradients=PARAMETER_BYTES * parameters if dense_gradients else 0,
        vectors=4 * batch_tokens * 4 * (shape.d_in + shape.d_out),
        codes=4 * batch_tokens * 8 * (shape.sparsifier.k + k_aux),
        product=4 * product,
    )


@lru_cache(maxsize=4096)
def parameters_of(shape: SAEConfig) -> int:
    """Return the number of parameters of an SAE, which is built without values."""
    with torch.device("meta"):
        return count_parameters(shape.build_empty())


def largest_k_aux(member: MemberConfig, shape: SAEConfig) -> int:
    """Return the largest number of latents per token that AuxK can select; 0 without AuxK."""
    if member.aux_k.weight == 0:
        return 0
    return max(1, shape.d_out // 2) if member.aux_k.k_aux is None else member.aux_k.k_aux


def model_bytes(model: Any) -> int:
    """Return the size of a model's parameters and buffers; it may be on PyTorch's meta device, without values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True, kw_only=True)
class ReadingBytes:
    """Memory in which the activations of a batch of windows are read, beside the model's weights, in bytes.

    Args:
        model: `MODEL_WORK` vectors of the model's width per token of a pass.
        per_value: for each value of an activation, over all hooks: one per token of a pass in the model's dtype, and
            one per token of the batch in float32.
    """

    model: int = 0
    per_value: int = 0

    @classmethod
    def of(cls, batch_tokens: int, pass_tokens: int, width: int, element_bytes: int) -> ReadingBytes:
        """Return the estimate for a batch of so many tokens, of which the model reads at most so many in a pass."""
        vectors = element_bytes * pass_tokens
        return cls(model=MODEL_WORK * width * vectors, per_value=vectors + 4 * batch_tokens)

    def total(self, values: int) -> int:
        """Return the memory for hooks whose widths have this sum."""
        return self.model + self.per_value * values
