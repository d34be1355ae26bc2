"""All requests for all compositions: top k per token or batch, or above thresholds, for every order.

Plain PyTorch on the operations of `kronsae.kernels.autograd`; a fast path is used where one exists for a request.
Pruning is exact for a composition of order ``parents``: within a head, the cell of the largest base and the largest
extension has the largest value. The head's bound is therefore attained, and the proof for products (README of this
folder) holds with the composition in place of the product. Only `kronecker_linear_select` is differentiable; its values
come from `linear_at`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from kronsae.kernels.portable import CHUNK_ELEMENTS, best_of_batch, cells_of
from kronsae.kernels.selection import Above, BatchChoice, Choice, Composition, PaddedPairs, Request, pad, parents

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
    if composition.order == "product" and len(plain) == len(requests):
        return [PaddedPairs(*pairs) for pairs in kronecker_linear_topk(x_BD, weight_HPD, bias_HP, d_base, plain)]
    weight_PD, bias_P = weight_HPD.flatten(0, 1), bias_HP.flatten()
    parts: list[list[PaddedPairs]] = [[] for _ in requests]
    with torch.no_grad():
        for _, pre_BP in choose("product_chunks", weight_PD)(x_BD, weight_PD, bias_P):
            pre_BHP = pre_BP.view(-1, *bias_HP.shape)
            for request, chosen in zip(requests, parts, strict=True):
                indices_BK, chosen_BK = select(pre_BHP, d_base, request, composition)
                pairs = choose("pairs_at", pre_BP)(pre_BP, indices_BK, d_base, bias_HP.shape[1] - d_base)
                chosen.append(PaddedPairs(*pairs)._replace(chosen_BK=chosen_BK))
    results = []
    for request, chosen in zip(requests, parts, strict=True):
        joined = _join(chosen, d_base, bias_HP.shape[1] - d_base)
        if len(chosen) > 1 and isinstance(request, BatchChoice):
            joined = _best_of_chunks(joined, request.total, d_base, bias_HP.shape[1] - d_base, composition)
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
    if composition.order == "product":
        if isinstance(request, BatchChoice):
            selection, chosen_BK = kronecker_batch_topk(pre_BHP, d_base, request.total)
            return selection.indices_BK, chosen_BK
        if request.latents_C is None:
            return kronecker_topk(pre_BHP, d_base, request.k).indices_BK, None
        return kronecker_topk_among(pre_BHP, d_base, request.k, request.latents_C).indices_BK, None
    if isinstance(request, BatchChoice):
        return batch_topk(pre_BHP, d_base, request.total, composition)
    return topk(pre_BHP, d_base, request, composition), None


def topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, choice: Choice, composition: Composition) -> Int[Tensor, "B K"]:
    """Return the k largest compositions of each token, among all or the listed latents."""
    heads, width = pre_BHP.shape[1:]
    cells = d_base * (width - d_base)
    if choice.latents_C is not None:
        _, base_rows_C, extension_rows_C = parents(choice.latents_C, d_base, width - d_base)
        found = []
        for part_BP in pre_BHP.flatten(1).split(max(1, CHUNK_ELEMENTS // len(choice.latents_C))):
            z_BC = composition.function(part_BP[:, base_rows_C], part_BP[:, extension_rows_C])
            found.append(choice.latents_C[z_BC.topk(choice.k, dim=1, sorted=False).indices])
        return torch.cat(found)
    expanded = heads if composition.order == "none" else min(choice.k, heads)
    found = []
    for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // (expanded * cells))):
        heads_BE = torch.arange(heads, device=pre_BHP.device).expand(len(part_BHP), heads)
        if expanded < heads:
            heads_BE = head_bounds(part_BHP, d_base, composition).topk(expanded, dim=1, sorted=False).indices
            part_BHP = part_BHP.gather(1, heads_BE.unsqueeze(-1).expand(-1, -1, width))
        flat_BK = cells_of(part_BHP, d_base, composition).flatten(1).topk(choice.k, dim=1, sorted=False).indices
        found.append(heads_BE.gather(1, flat_BK // cells) * cells + flat_BK % cells)
    return torch.cat(found)


def batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int, composition: Composition) -> Padded:
    """Return the ``total`` largest positive compositions of the batch, from the ``total`` best heads of each chunk."""
    heads, width = pre_BHP.shape[1:]
    cells = d_base * (width - d_base)

    def candidates() -> Iterator[tuple[Tensor, Tensor]]:
        first = 0
        for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // (heads * cells))):
            pairs_E = torch.arange(len(part_BHP) * heads, device=pre_BHP.device)
            if composition.order != "none" and total < len(pairs_E):
                bounds_BH = head_bounds(part_BHP, d_base, composition)
                pairs_E = bounds_BH.flatten().topk(total, sorted=False).indices
            z_EC = cells_of(part_BHP.flatten(0, 1)[pairs_E], d_base, composition)
            flat_EC = (pairs_E.unsqueeze(1) + first * heads) * cells + torch.arange(cells, device=pre_BHP.device)
            yield z_EC.flatten(), flat_EC.flatten()
            first += len(part_BHP)

    _, places_N = best_of_batch(candidates(), total, pre_BHP)
    return pad(places_N // (heads * cells), places_N % (heads * cells), len(pre_BHP))


def head_bounds(pre_BHP: Float[Tensor, "B H P"], d_base: int, composition: Composition) -> Float[Tensor, "B H"]:
    """Return the largest composition of each head: that of its largest base and its largest extension."""
    return composition.function(*choose("head_maxima", pre_BHP)(pre_BHP, d_base))


def _best_of_chunks(
    joined: PaddedPairs, total: int, d_base: int, d_extension: int, composition: Composition
) -> PaddedPairs:
    """Select the ``total`` best pairs from the best of each chunk; ties go to the earlier token, then the latent."""
    assert joined.chosen_BK is not None  # a BatchChoice is always padded
    u_BK, v_BK = joined.pre_BR.chunk(2, dim=1)
    order = composition.order
    value_BK = u_BK.relu() * v_BK.relu() if order == "product" else composition.function(u_BK, v_BK)
    value_BK = torch.where(joined.chosen_BK, value_BK, -torch.inf)
    kept_BK = torch.zeros_like(joined.chosen_BK)
    kept_BK.view(-1)[value_BK.flatten().sort(stable=True, descending=True).indices[:total]] = True
    kept_BK &= joined.chosen_BK
    indices_BK, chosen_BK = pad(kept_BK.nonzero()[:, 0], joined.selection.indices_BK[kept_BK], len(kept_BK))
    selection = parents(indices_BK, d_base, d_extension)
    pre = [half_BK.new_zeros(chosen_BK.shape).masked_scatter_(chosen_BK, half_BK[kept_BK]) for half_BK in (u_BK, v_BK)]
    rows_BR = torch.cat([selection.base_rows_BK, selection.extension_rows_BK], dim=1)
    return PaddedPairs(selection, rows_BR, torch.cat(pre, dim=1), chosen_BK)


def _join(parts: list[PaddedPairs], d_base: int, d_extension: int) -> PaddedPairs:
    """Concatenate chunks along tokens, each padded with latent 0 to the widest."""
    width = max(part.selection.indices_BK.shape[1] for part in parts)
    if len(parts) == 1:
        return parts[0]

    def widen(tensor_BK: Tensor) -> Tensor:
        return pad_columns(tensor_BK, (0, width - tensor_BK.shape[1]))

    selection = parents(torch.cat([widen(part.selection.indices_BK) for part in parts]), d_base, d_extension)
    rows_BR = torch.cat([selection.base_rows_BK, selection.extension_rows_BK], dim=1)
    pre = [[widen(half) for half in part.pre_BR.chunk(2, dim=1)] for part in parts]
    pre_BR = torch.cat([torch.cat(halves) for halves in zip(*pre, strict=True)], dim=1)
    marks = [part.chosen_BK for part in parts if part.chosen_BK is not None]
    return PaddedPairs(selection, rows_BR, pre_BR, torch.cat([widen(mark) for mark in marks]) if marks else None)
