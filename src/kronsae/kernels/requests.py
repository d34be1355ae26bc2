"""All requests for all compositions: top k per token or batch, or above thresholds, for every order.

Plain PyTorch on the operations of `kronsae.kernels.autograd`; a fast path is used where one exists for a request.
Pruning is exact for a composition of order ``parents``: within a head, the cell of the largest base and the largest
extension has the largest value, or with null symbols one of these two alone. The head's bound is therefore attained,
and the proof for products (README of this folder) holds with the composition in place of the product. Only
`kronecker_linear_select` is differentiable; its values come from `linear_at`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad as pad_columns

from kronsae.kernels.autograd import (
    kronecker_batch_topk,
    kronecker_linear_topk,
    kronecker_topk,
    kronecker_topk_among,
    linear_at,
)
from kronsae.kernels.dispatch import choose
from kronsae.kernels.portable import CHUNK_ELEMENTS, best_of_batch, best_of_head, cells_of, topk
from kronsae.kernels.selection import (
    NULL_PRODUCTS,
    PRODUCTS,
    Above,
    BatchChoice,
    Choice,
    Composition,
    KroneckerSelection,
    PaddedPairs,
    Request,
    cells_per_head,
    composed,
    pad,
)

Padded = tuple[Int[Tensor, "B K"], Bool[Tensor, "B K"] | None]


def kronecker_linear_select(
    x_BD: Float[Tensor, "B D"],
    weight_HPD: Float[Tensor, "H P D"],
    bias_HP: Float[Tensor, "H P"],
    d_base: int,
    requests: Sequence[Request],
    composition: Composition,
) -> list[PaddedPairs]:
    """Answer several requests from the heads of ``x W^T + b``; the values of the selected pairs are differentiable.

    The pre-latents exist one chunk at a time. For a `BatchChoice` only the best pairs of each chunk are kept.
    """
    plain = [request for request in requests if isinstance(request, Choice)]
    null = composition.alone is not None
    if composition.order == "product" and len(plain) == len(requests):
        return [PaddedPairs(*pairs) for pairs in kronecker_linear_topk(x_BD, weight_HPD, bias_HP, d_base, plain, null)]
    weight_PD, bias_P = weight_HPD.flatten(0, 1), bias_HP.flatten()
    parts: list[list[PaddedPairs]] = [[] for _ in requests]
    with torch.no_grad():
        for _, pre_BP in choose("product_chunks", weight_PD)(x_BD, weight_PD, bias_P):
            pre_BHP = pre_BP.view(-1, *bias_HP.shape)
            for request, chosen in zip(requests, parts, strict=True):
                indices_BK, chosen_BK = select(pre_BHP, d_base, request, composition)
                pairs = choose("pairs_at", pre_BP)(pre_BP, indices_BK, d_base, bias_HP.shape[1] - d_base, null)
                chosen.append(PaddedPairs(*pairs)._replace(chosen_BK=chosen_BK))
    results = []
    for request, chosen in zip(requests, parts, strict=True):
        joined = _join(chosen, d_base)
        if len(chosen) > 1 and isinstance(request, BatchChoice):
            joined = _best_of_chunks(joined, request.total, d_base, bias_HP.shape[1] - d_base, ranking(composition))
        if torch.is_grad_enabled():
            pre_BR = linear_at(x_BD, weight_PD, bias_P, joined.rows_BR, joined.pre_BR)
            joined = joined._replace(pre_BR=pre_BR)
        results.append(joined)
    return results


@torch.no_grad()
def select(pre_BHP: Float[Tensor, "B H P"], d_base: int, request: Request, composition: Composition) -> Padded:
    """Return the latents that meet one request, and a mask of those that are not padding (None: all)."""
    if isinstance(request, Above):
        operation = choose("kronecker_above", pre_BHP)
        tokens_N, latents_N = operation(pre_BHP, d_base, request.thresholds_F, composition)
        return pad(tokens_N, latents_N, len(pre_BHP))
    if composition.order == "product" and composition.alone is None:
        if isinstance(request, BatchChoice):
            selection, chosen_BK = kronecker_batch_topk(pre_BHP, d_base, request.total)
            return selection.indices_BK, chosen_BK
        if request.latents_C is None:
            return kronecker_topk(pre_BHP, d_base, request.k).indices_BK, None
        return kronecker_topk_among(pre_BHP, d_base, request.k, request.latents_C).indices_BK, None
    if isinstance(request, BatchChoice):
        return batch_topk(pre_BHP, d_base, request.total, ranking(composition))
    return topk(pre_BHP, d_base, request, ranking(composition), choose("head_maxima", pre_BHP)), None


def ranking(composition: Composition) -> Composition:
    """Return what to compare instead of a composition of order ``product``: two products may have one rounded root."""
    if composition.order != "product":
        return composition
    return PRODUCTS if composition.alone is None else NULL_PRODUCTS


def batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int, composition: Composition) -> Padded:
    """Return the ``total`` largest positive compositions of the batch, from the ``total`` best heads of each chunk."""
    heads, width = pre_BHP.shape[1:]
    cells = cells_per_head(d_base, width - d_base, composition.alone is not None)

    def candidates() -> Iterator[tuple[Tensor, Tensor]]:
        first = 0
        for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // (heads * cells))):
            pairs_E = torch.arange(len(part_BHP) * heads, device=pre_BHP.device)
            if composition.order != "none" and total < len(pairs_E):
                base_BH, extension_BH = choose("head_maxima", part_BHP)(part_BHP, d_base)
                bounds_BH = best_of_head(base_BH, extension_BH, composition)
                pairs_E = bounds_BH.flatten().topk(total, sorted=False).indices
            z_EC = cells_of(part_BHP.flatten(0, 1)[pairs_E], d_base, composition)
            flat_EC = (pairs_E.unsqueeze(1) + first * heads) * cells + torch.arange(cells, device=pre_BHP.device)
            yield z_EC.flatten(), flat_EC.flatten()
            first += len(part_BHP)

    _, places_N = best_of_batch(candidates(), total, pre_BHP)
    return pad(places_N // (heads * cells), places_N % (heads * cells), len(pre_BHP))


def _best_of_chunks(
    joined: PaddedPairs, total: int, d_base: int, d_extension: int, composition: Composition
) -> PaddedPairs:
    """Select the ``total`` best pairs from the best of each chunk; ties go to the earlier token, then the latent."""
    assert joined.chosen_BK is not None  # a BatchChoice is always padded
    u_BK, v_BK = joined.pre_BR.chunk(2, dim=1)
    value_BK = composed(composition, u_BK, v_BK, joined.selection.indices_BK, d_base, d_extension)
    value_BK = torch.where(joined.chosen_BK, value_BK, -torch.inf)
    kept_BK = torch.zeros_like(joined.chosen_BK)
    kept_BK.view(-1)[value_BK.flatten().sort(stable=True, descending=True).indices[:total]] = True
    kept_BK &= joined.chosen_BK
    indices_BK, chosen_BK = pad(kept_BK.nonzero()[:, 0], joined.selection.indices_BK[kept_BK], len(kept_BK))

    def kept(entries_BK: Tensor, padding: int = 0) -> Tensor:
        wanted_BK = entries_BK.new_full(chosen_BK.shape, padding)
        return wanted_BK.masked_scatter_(chosen_BK, entries_BK[kept_BK])

    _, base_rows_BK, extension_rows_BK = joined.selection
    selection = KroneckerSelection(indices_BK, kept(base_rows_BK), kept(extension_rows_BK, d_base))
    return PaddedPairs(
        selection, torch.cat(selection[1:], dim=1), torch.cat([kept(u_BK), kept(v_BK)], dim=1), chosen_BK
    )


def _join(parts: list[PaddedPairs], d_base: int) -> PaddedPairs:
    """Concatenate chunks along tokens, each padded with latent 0, base 0 and extension 0 to the widest."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.selection.indices_BK.shape[1] for part in parts)

    def join(chunks: Iterable[Tensor], padding: int = 0) -> Tensor:
        return torch.cat([pad_columns(chunk, (0, width - chunk.shape[1]), value=padding) for chunk in chunks])

    selections = zip(*(part.selection for part in parts), strict=True)
    selection = KroneckerSelection(*map(join, selections, (0, 0, d_base)))
    pre = [join(halves) for halves in zip(*(part.pre_BR.chunk(2, dim=1) for part in parts), strict=True)]
    marks = [part.chosen_BK for part in parts if part.chosen_BK is not None]
    return PaddedPairs(
        selection, torch.cat(selection[1:], dim=1), torch.cat(pre, dim=1), join(marks) if marks else None
    )
