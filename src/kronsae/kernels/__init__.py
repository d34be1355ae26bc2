"""Exact selection, sparse products and the optimiser step; `reference` defines the correct result of each operation."""

from kronsae.kernels.autograd import (
    RowGradients,
    adamw,
    collect_row_gradients,
    decode,
    kronecker_batch_topk,
    kronecker_linear_topk,
    kronecker_topk,
    kronecker_topk_among,
    linear_above,
    linear_at,
    linear_batch_topk,
    linear_topk,
    sampled_products,
)
from kronsae.kernels.dispatch import explain, use
from kronsae.kernels.optimizer import RowAdamW, clip_scale, grad_norm
from kronsae.kernels.requests import kronecker_linear_select
from kronsae.kernels.rows import AdamW, RowGradient
from kronsae.kernels.selection import (
    Above,
    BatchChoice,
    BatchSelection,
    Choice,
    ChosenPairs,
    Composition,
    KroneckerSelection,
    Order,
    PaddedPairs,
    Request,
    parents,
)

__all__ = [
    "Above",
    "AdamW",
    "BatchChoice",
    "BatchSelection",
    "Choice",
    "ChosenPairs",
    "Composition",
    "KroneckerSelection",
    "Order",
    "PaddedPairs",
    "Request",
    "RowAdamW",
    "RowGradient",
    "RowGradients",
    "adamw",
    "clip_scale",
    "collect_row_gradients",
    "decode",
    "explain",
    "grad_norm",
    "kronecker_batch_topk",
    "kronecker_linear_select",
    "kronecker_linear_topk",
    "kronecker_topk",
    "kronecker_topk_among",
    "linear_above",
    "linear_at",
    "linear_batch_topk",
    "linear_topk",
    "parents",
    "sampled_products",
    "use",
]
