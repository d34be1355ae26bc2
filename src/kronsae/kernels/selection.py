"""Requests for latents, results of selections, and the index arithmetic between a latent and its two parents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KroneckerSelection(NamedTuple):
    """K selected latents per token, with the rows of their two parents.

    Rows index the H*(M+N) pre-latents, head by head, with bases before extensions within a head.
    """

    indices_BK: Int[Tensor, "B K"]
    base_rows_BK: Int[Tensor, "B K"]
    extension_rows_BK: Int[Tensor, "B K"]


class BatchSelection(NamedTuple):
    """Selected latents of a batch. K is the largest number of any token; ``chosen`` is False for padding."""

    selection: KroneckerSelection
    chosen_BK: Bool[Tensor, "B K"]


class Choice(NamedTuple):
    """Request for the ``k`` largest latents per token, among all or among the listed ``latents_C``."""

    k: int
    latents_C: Int[Tensor, " C"] | None = None


class BatchChoice(NamedTuple):
    """Request for the ``total`` largest positive latents of the whole batch (BatchTopK)."""

    total: int


class Above(NamedTuple):
    """Request for every positive latent above its own threshold (JumpReLU)."""

    thresholds_F: Float[Tensor, " F"]


Request = Choice | BatchChoice | Above
Order = Literal["product", "parents", "none"]


class Composition(NamedTuple):
    """How a base and an extension compose, and what orders the result.

    - ``product``: increases with ``relu(u) relu(v)``, so a selection by product is a selection by the composition;
    - ``parents``: increases with u and with v and is at most 0 unless both are positive. A head's largest value is then
      that of its largest base and its largest extension, and pruning by head is exact;
    - ``none``: neither; all latents of a token are computed.

    For order ``product``, ``least_product(theta)`` may give a lower bound: if the product of the parents is below it,
    the composition is not above theta, rounding included. A bound that is too low costs only time.

    With ``alone``, heads have null symbols: one cell more per base and per extension, for it without the other parent.
    ``alone(w, rival)`` is the value of a parent w whose largest possible partner is ``rival``. It must increase with w
    and be at most 0 unless w is positive; a head's largest value is then still known from its two maxima.
    """

    order: Order
    function: Callable[[Tensor, Tensor], Tensor]
    least_product: Callable[[Tensor], Tensor] | None = None
    alone: Callable[[Tensor, Tensor], Tensor] | None = None


def positive_product(u: Tensor, v: Tensor) -> Tensor:
    """``relu(u) relu(v)``: what ranks the pairs of every composition of order ``product``."""
    return u.relu() * v.relu()


def squared_excess(w: Tensor, rival: Tensor) -> Tensor:
    """``relu(w - relu(rival))^2``: ranks a parent alone beside the products of pairs, on the same squared scale."""
    return (w - rival.relu()).relu().square()


PRODUCTS = Composition("product", positive_product)
NULL_PRODUCTS = Composition("product", positive_product, alone=squared_excess)


def cells_per_head(d_base: int, d_extension: int, null: bool) -> int:
    """Return the latents of a head: ``M N``, or ``(M + 1)(N + 1) - 1`` with null symbols."""
    return (d_base + null) * (d_extension + null) - null


def composed(
    composition: Composition, u_BK: Tensor, v_BK: Tensor, indices_BK: Tensor, d_base: int, d_extension: int
) -> Float[Tensor, "B K"]:
    """Return the compositions of given latents from the values of their parents, which are those of `parents_at`."""
    z_BK = composition.function(u_BK, v_BK)
    if composition.alone is None:
        return z_BK
    cell_BK = indices_BK % cells_per_head(d_base, d_extension, True)
    base_BK = cell_BK // (d_extension + 1)
    z_BK = torch.where(cell_BK - base_BK * (d_extension + 1) == d_extension, composition.alone(u_BK, v_BK), z_BK)
    return torch.where(base_BK == d_base, composition.alone(v_BK, u_BK), z_BK)


class PursuitRounds(NamedTuple):
    """What a pursuit does: how many latents each round takes, how many refit steps follow, and the first share.

    `kronsae.core.pursuit` says what these mean.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    start: float


class Pursued(NamedTuple):
    """What a pursuit chose, round after round in the columns.

    ``places`` are the latents' columns among the candidates; -1 is padding, whose latent and value are 0. All k values
    of a token with a candidate that is not finite are NaN.
    """

    values_BK: Float[Tensor, "B K"]
    latents_BK: Int[Tensor, "B K"]
    places_BK: Int[Tensor, "B K"]


class ChosenPairs(NamedTuple):
    """A selection with its parents' values: ``pre[:, :K]`` holds u of the bases, ``pre[:, K:]`` v of the extensions."""

    selection: KroneckerSelection
    rows_BR: Int[Tensor, "B R"]
    pre_BR: Float[Tensor, "B R"]


class PaddedPairs(NamedTuple):
    """`ChosenPairs` for any request; ``chosen`` is False for padding. None: there is no padding."""

    selection: KroneckerSelection
    rows_BR: Int[Tensor, "B R"]
    pre_BR: Float[Tensor, "B R"]
    chosen_BK: Bool[Tensor, "B K"] | None = None


def parents(indices_BK: Int[Tensor, "... K"], d_base: int, d_extension: int) -> KroneckerSelection:
    """Return the parents' rows for ``index = h*M*N + i*N + j``: base ``h*(M+N) + i``, extension ``h*(M+N) + M + j``."""
    head = indices_BK // (d_base * d_extension)
    cell = indices_BK - head * (d_base * d_extension)
    base = cell // d_extension
    first_row = head * (d_base + d_extension)
    return KroneckerSelection(indices_BK, first_row + base, first_row + d_base + (cell - base * d_extension))


def parents_at(
    pre_BP: Float[Tensor, "B P"], indices_BK: Int[Tensor, "B K"], d_base: int, d_extension: int, null: bool
) -> KroneckerSelection:
    """Return the parents' rows; with null symbols, the absent parent's row is that of its head's largest.

    With null symbols the index is ``h*C + i*(N+1) + j`` with ``C = (M+1)(N+1) - 1``: ``j = N`` is base i alone, whose
    value depends on the head's largest extension; ``i = M`` is extension j alone. Of equal ones the first is taken.
    """
    if not null:
        return parents(indices_BK, d_base, d_extension)
    cells, width = cells_per_head(d_base, d_extension, null), d_base + d_extension
    head_BK = indices_BK // cells
    cell_BK = indices_BK - head_BK * cells
    base_BK = cell_BK // (d_extension + 1)
    extension_BK = cell_BK - base_BK * (d_extension + 1)
    rows_BKP = (head_BK * width).unsqueeze(-1) + torch.arange(width, device=pre_BP.device)
    pre_BKP = pre_BP.gather(1, rows_BKP.flatten(1)).view(rows_BKP.shape)
    base_BK = torch.where(base_BK < d_base, base_BK, pre_BKP[..., :d_base].argmax(-1))
    extension_BK = torch.where(extension_BK < d_extension, extension_BK, pre_BKP[..., d_base:].argmax(-1))
    return KroneckerSelection(indices_BK, head_BK * width + base_BK, head_BK * width + d_base + extension_BK)


def pad(
    tokens_N: Int[Tensor, " N"], latents_N: Int[Tensor, " N"], tokens: int
) -> tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Lay out (token, latent) pairs, tokens ascending, as one row per token; also return a mask of the pairs.

    K is the largest number of latents of any token, at least 1. Padding is latent 0.
    """
    counts_B = torch.bincount(tokens_N, minlength=tokens)
    place_N = torch.arange(len(tokens_N), device=tokens_N.device) - (counts_B.cumsum(0) - counts_B)[tokens_N]
    width = max(1, int(counts_B.max()) if tokens else 1)
    indices_BK = latents_N.new_zeros(tokens, width)
    indices_BK[tokens_N, place_N] = latents_N
    return indices_BK, torch.arange(width, device=tokens_N.device) < counts_B.unsqueeze(1)
