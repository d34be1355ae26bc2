"""The operations the library's speed rests on; `reference` is the definition of right for each of them."""

from kronsae.kernels.autograd import (
    RowGradients,
    adamw,
    collect_row_gradients,
    decode,
    kronecker_batch_topk,
    kronecker_linear_topk,
    kronecker_topk,
    kronecker_topk_among,
    linear_at,
    linear_topk,
)
from kronsae.kernels.dispatch import explain, use
from kronsae.kernels.optimizer import RowAdamW, clip_scale, grad_norm
from kronsae.kernels.rows import AdamW, RowGradient
from kronsae.kernels.selection import BatchSelection, Choice, ChosenPairs, KroneckerSelection, parents

__all__ = [
    "AdamW",
    "BatchSelection",
    "Choice",
    "ChosenPairs",
    "KroneckerSelection",
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
    "kronecker_linear_topk",
    "kronecker_topk",
    "kronecker_topk_among",
    "linear_at",
    "linear_topk",
    "parents",
    "use",
]
