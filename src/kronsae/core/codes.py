"""Sparse codes: the output of encoder and sparsifier, and the input of the decoder.

Shape letters, used as suffixes of local names throughout the library:

====  ==========================================  ====  =====================================
B     tokens in a batch                           H     heads (``num_heads``)
D     width of the model, ``d_in``                M     bases per head (``d_base``)
F     latents in the dictionary, ``d_sae``        N     extensions per head (``d_extension``)
K     latents kept per token, ``k``               P     pre-latents, ``H * (M + N)``
S, T  sequences, positions in a sequence          C     a chosen subset of the latents
O     output width, ``d_out``; D for an SAE
====  ==========================================  ====  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kronsae.core.shares import batch_mean


@dataclass(frozen=True)
class SparseCodes:
    """At most K active latents per token, stored as values and latent indices.

    A value of exactly 0 is padding: that entry holds no active latent. If the number of active latents varies between
    tokens, K is the largest number over the tokens. The indices of active latents within one token are distinct; the
    indices of padding may repeat. The order within a token has no meaning.

    Args:
        values: ``[..., K]`` activations, >= 0.
        indices: ``[..., K]`` latent indices in ``[0, d_sae)``, int64.
        d_sae: F, the number of latents in the dictionary.

    Example:
        >>> codes = SparseCodes(torch.tensor([[2.0, 0.0]]), torch.tensor([[3, 1]]), d_sae=4)
        >>> codes.to_dense()
        tensor([[0., 0., 0., 2.]])
    """

    values: Float[Tensor, "... K"]
    indices: Int[Tensor, "... K"]
    d_sae: int

    @property
    def active(self) -> Bool[Tensor, "... K"]:
        """Mask of the entries that hold an active latent: ``values != 0``."""
        return self.values != 0

    def l0(self) -> Float[Tensor, ""]:
        """Number of active latents per token, mean over tokens."""
        return batch_mean(self.active.sum(-1).double().flatten())

    def to_dense(self) -> Float[Tensor, "... F"]:
        """Dense ``[..., d_sae]`` tensor with zeros; differentiable in the values. Large: use it on small batches."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices, self.values)

    def reshape(self, *leading: int) -> SparseCodes:
        """Same codes with other leading dimensions."""
        k = self.values.shape[-1]
        return SparseCodes(self.values.reshape(*leading, k), self.indices.reshape(*leading, k), self.d_sae)

    def only(self, kept: Bool[Tensor, "... K"], padding: int = 0) -> SparseCodes:
        """Codes of the entries in a mask, in as few columns as possible; differentiable.

        Args:
            kept: the entries.
            padding: index of the entries that fill up a token's columns; their value is 0.
        """
        width = max(1, int(kept.sum(-1).max()) if kept.numel() else 1)
        columns_BW = kept.to(torch.int8).topk(width, dim=-1, sorted=False).indices
        values_BW = torch.where(kept, self.values, 0.0).gather(-1, columns_BW)
        return SparseCodes(values_BW, torch.where(kept, self.indices, padding).gather(-1, columns_BW), self.d_sae)

    def counts(self) -> Int[Tensor, " F"]:
        """Number of tokens on which each latent is active."""
        return torch.bincount(self.indices[self.active], minlength=self.d_sae)
