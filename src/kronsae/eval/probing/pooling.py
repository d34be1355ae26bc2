"""Means over the tokens of each text: of activations, and of sparse codes without a dense array."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.codes import SparseCodes


def mean_activations(x_ND: Float[Tensor, "N D"], tokens_S: Sequence[int]) -> Float[Tensor, "S D"]:
    """Return the mean of the activations of each text.

    Args:
        x_ND: activations of the texts' tokens, text after text.
        tokens_S: number of tokens of each text, all above 0; their sum is N.
    """
    return torch.stack([part.mean(0) for part in x_ND.split(list(tokens_S))])


def mean_codes(codes: SparseCodes, tokens_S: Sequence[int]) -> SparseCodes:
    """Return the mean of the codes of each text; tokens on which a latent is inactive count as 0.

    A text has an entry for each latent that is active on one of its tokens, in the order of the latents.

    Args:
        codes: codes of the texts' tokens, text after text, on the CPU.
        tokens_S: number of tokens of each text, all above 0; their sum is the number of tokens.
    """
    sizes_S = torch.tensor(list(tokens_S))
    text_N = torch.repeat_interleave(torch.arange(len(sizes_S)), sizes_S)
    token_A, k_A = codes.active.nonzero(as_tuple=True)
    key_A = text_N[token_A] * codes.d_sae + codes.indices[token_A, k_A]
    key_U, entry_A = key_A.unique(return_inverse=True)  # sorted: by text, then by latent
    sum_U = torch.zeros(len(key_U), dtype=torch.float64)
    sum_U.index_add_(0, entry_A, codes.values[token_A, k_A].double())
    text_U = key_U // codes.d_sae
    entries_S = torch.bincount(text_U, minlength=len(sizes_S))
    place_U = torch.arange(len(key_U)) - (entries_S.cumsum(0) - entries_S)[text_U]
    shape = (len(sizes_S), int(entries_S.max()))
    values_SK, indices_SK = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    values_SK[text_U, place_U] = (sum_U / sizes_S[text_U]).float()
    indices_SK[text_U, place_U] = key_U % codes.d_sae
    return SparseCodes(values_SK, indices_SK, codes.d_sae)
