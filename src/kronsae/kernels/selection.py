"""What can be asked of latents, what a selection returns, and the arithmetic between a latent and its two parents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KroneckerSelection(NamedTuple):
    """K chosen latents per token and the two pre-latents each is composed of.

    ``rows`` number the H*(M+N) pre-latents, heads one after another, bases before extensions within a head.
    """

    indices_BK: Int[Tensor, "B K"]
    base_rows_BK: Int[Tensor, "B K"]
    extension_rows_BK: Int[Tensor, "B K"]


class BatchSelection(NamedTuple):
    """The chosen latents of a batch: K is the largest number any token got, ``chosen`` marks what is not padding."""

    selection: KroneckerSelection
    chosen_BK: Bool[Tensor, "B K"]


class Choice(NamedTuple):
    """A request for the ``k`` largest latents per token, of all or (``latents_C``) of the ones listed."""

    k: int
    latents_C: Int[Tensor, " C"] | None = None


class BatchChoice(NamedTuple):
    """A request for the ``total`` largest positive latents of the whole batch (BatchTopK)."""

    total: int


class Above(NamedTuple):
    """A request for every positive latent above a threshold of its own (JumpReLU)."""

    thresholds_F: Float[Tensor, " F"]


Request = Choice | BatchChoice | Above
Order = Literal["product", "parents", "none"]


class Composition(NamedTuple):
    """How a base and an extension compose, and by what the result is ordered.

    - ``product``: it rises with ``relu(u) relu(v)``, so the selections by product are its selections;
    - ``parents``: it rises with u and with v and is at most 0 unless both are positive, so a head's largest value is
      that of its largest base and its largest extension, and pruning by head stays exact;
    - ``none``: neither; all of a token's latents are computed.

    Of order ``product``, ``least_product(theta)`` may say below which product of the parents no composition is above
    theta, however it is rounded; what it lets through in excess costs time only.
    """

    order: Order
    function: Callable[[Tensor, Tensor], Tensor]
    least_product: Callable[[Tensor], Tensor] | None = None


class ChosenPairs(NamedTuple):
    """A selection with its parents' values: ``pre[:, :K]`` are the bases' u, ``pre[:, K:]`` the extensions' v."""

    selection: KroneckerSelection
    rows_BR: Int[Tensor, "B R"]
    pre_BR: Float[Tensor, "B R"]


class PaddedPairs(NamedTuple):
    """`ChosenPairs` of any request; ``chosen`` marks what is not padding, None: all of it was chosen."""

    selection: KroneckerSelection
    rows_BR: Int[Tensor, "B R"]
    pre_BR: Float[Tensor, "B R"]
    chosen_BK: Bool[Tensor, "B K"] | None = None


def parents(indices_BK: Int[Tensor, "... K"], d_base: int, d_extension: int) -> KroneckerSelection:
    """Invert ``index = h*M*N + i*N + j``: base row ``h*(M+N) + i``, extension row ``h*(M+N) + M + j``."""
    head = indices_BK // (d_base * d_extension)
    cell = indices_BK - head * (d_base * d_extension)
    base = cell // d_extension
    first_row = head * (d_base + d_extension)
    return KroneckerSelection(indices_BK, first_row + base, first_row + d_base + (cell - base * d_extension))


def pad(
    tokens_N: Int[Tensor, " N"], latents_N: Int[Tensor, " N"], tokens: int
) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Lay out (token, latent) pairs, tokens ascending, as one row per token and mark what is not padding.

    K is the largest number any token has, at least 1; padding is latent 0.
    """
    counts_B = torch.bincount(tokens_N, minlength=tokens)
    place_N = torch.arange(len(tokens_N), device=tokens_N.device) - (counts_B.cumsum(0) - counts_B)[tokens_N]
    width = max(1, int(counts_B.max()) if tokens else 1)
    indices_BK = latents_N.new_zeros(tokens, width)
    indices_BK[tokens_N, place_N] = latents_N
    return indices_BK, torch.arange(width, device=tokens_N.device) < counts_B.unsqueeze(1)
