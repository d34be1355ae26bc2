"""Portable path in plain PyTorch: no B x F tensor, forward or backward; any device, any floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from kronsae.kernels.pursuit import Rows, pursue_by
from kronsae.kernels.rows import AdamW, RowGradient, Term
from kronsae.kernels.selection import (
    NULL_PRODUCTS,
    PRODUCTS,
    BatchSelection,
    Choice,
    ChosenPairs,
    Composition,
    KroneckerSelection,
    Pursued,
    PursuitRounds,
    cells_per_head,
    pad,
    parents,
    parents_at,
)

CHUNK_ELEMENTS = 2**22  # largest temporary: 16 MB of fp32, about the size above which the CPU's caches stop helping
PRODUCT_ELEMENTS = 2**24  # outputs of one product: 64 MB of fp32; a product of fewer than 64 tokens is inefficient
CUDA_PRODUCT_ELEMENTS = 2**27  # 512 MB: each product reads the whole weight again, from the GPU's memory


def product_chunks(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"]
) -> Iterator[tuple[int, Float[Tensor, "C P"]]]:
    """Yield ``x W^T + b`` in chunks of tokens, each with the index of its first token."""
    first, tokens = 0, max(64, PRODUCT_ELEMENTS // len(weight_PD))
    if x_BD.is_cuda:
        tokens = max(128, CUDA_PRODUCT_ELEMENTS // len(weight_PD) // 128 * 128)  # whole tiles of its product
    for part_BD in x_BD.split(tokens):
        yield first, torch.addmm(bias_P, part_BD, weight_PD.T)
        first += len(part_BD)


def head_maxima(pre_BHP: Float[Tensor, "B H P"], d_base: int) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
    """Return the largest base and the largest extension of each head, 0 if none is positive."""
    return pre_BHP[..., :d_base].amax(-1).relu(), pre_BHP[..., d_base:].amax(-1).relu()


def kronecker_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int) -> KroneckerSelection:
    """Select the k largest products exactly."""
    return parents(topk(pre_BHP, d_base, Choice(k), PRODUCTS), d_base, pre_BHP.shape[-1] - d_base)


def kronecker_topk_among(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int, latents_C: Int[Tensor, " C"]
) -> KroneckerSelection:
    """Select the k largest products among the given latents exactly (AuxK: the dead latents); ``k <= C``."""
    return parents(topk(pre_BHP, d_base, Choice(k, latents_C), PRODUCTS), d_base, pre_BHP.shape[-1] - d_base)


def topk(
    pre_BHP: Float[Tensor, "B H P"],
    d_base: int,
    choice: Choice,
    composition: Composition,
    maxima: Callable[[Tensor, int], tuple[Tensor, Tensor]] = head_maxima,
) -> Int[Tensor, "B K"]:
    """Return the k largest compositions of each token exactly, using the head maxima (proof: README of this folder).

    For a head outside the k heads of the largest bound, each of those k heads holds a composition at least as large as
    any of its own. So only those k heads are expanded. Among listed latents, all of these are computed.
    """
    heads, width = pre_BHP.shape[1:]
    cells = cells_per_head(d_base, width - d_base, composition.alone is not None)
    if choice.latents_C is not None:
        return torch.cat([
            choice.latents_C[z_BC.topk(choice.k, dim=1, sorted=False).indices]
            for z_BC in _listed(pre_BHP, d_base, choice.latents_C, composition)
        ])  # fmt: skip
    expanded = heads if composition.order == "none" else min(choice.k, heads)
    found = []
    for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // (expanded * cells))):
        heads_BE = torch.arange(heads, device=pre_BHP.device).expand(len(part_BHP), heads)
        if expanded < heads:
            bounds_BH = best_of_head(*maxima(part_BHP, d_base), composition)
            heads_BE = bounds_BH.topk(expanded, dim=1, sorted=False).indices
            part_BHP = part_BHP.gather(1, heads_BE.unsqueeze(-1).expand(-1, -1, width))
        flat_BK = cells_of(part_BHP, d_base, composition).flatten(1).topk(choice.k, dim=1, sorted=False).indices
        found.append(heads_BE.gather(1, flat_BK // cells) * cells + flat_BK % cells)
    return torch.cat(found)


def _listed(pre_BHP: Tensor, d_base: int, latents_C: Tensor, composition: Composition) -> Iterator[Tensor]:
    """Yield the compositions of the listed latents, in chunks of tokens; with null symbols, cut from those of all."""
    if composition.alone is not None:
        cells = cells_per_head(d_base, pre_BHP.shape[-1] - d_base, True)
        for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // (pre_BHP.shape[1] * cells))):
            yield cells_of(part_BHP, d_base, composition).flatten(1)[:, latents_C]
        return
    _, base_rows_C, extension_rows_C = parents(latents_C, d_base, pre_BHP.shape[-1] - d_base)
    for part_BP in pre_BHP.flatten(1).split(max(1, CHUNK_ELEMENTS // len(latents_C))):
        yield composition.function(part_BP[:, base_rows_C], part_BP[:, extension_rows_C])


def best_of_head(
    base_BH: Float[Tensor, "B H"], extension_BH: Float[Tensor, "B H"], composition: Composition
) -> Float[Tensor, "B H"]:
    """Return the largest composition of each head, from its largest base and its largest extension."""
    best_BH = composition.function(base_BH, extension_BH)
    if composition.alone is None:
        return best_BH
    alone_BH = torch.maximum(composition.alone(base_BH, extension_BH), composition.alone(extension_BH, base_BH))
    return torch.maximum(best_BH, alone_BH)


def kronecker_batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int) -> BatchSelection:
    """Select the ``total`` largest positive products of the batch from the ``total`` best (token, head) pairs."""
    tokens, heads, width = pre_BHP.shape
    d_extension = width - d_base
    expanded = min(total, tokens * heads)
    bounds_BH = best_of_head(*head_maxima(pre_BHP, d_base), PRODUCTS)
    pairs_E = bounds_BH.flatten().topk(expanded, sorted=False).indices.sort().values
    products = cells_of(pre_BHP.flatten(0, 1)[pairs_E], d_base, PRODUCTS).flatten()
    best = products.topk(min(total, len(products)), sorted=False).indices.sort().values
    best = best[products[best] > 0]
    cells = d_base * d_extension
    pairs = pairs_E[best // cells]
    return pad_selection(pairs // heads, pairs % heads * cells + best % cells, tokens, d_base, d_extension)


def pad_selection(tokens_N: Tensor, latents_N: Tensor, tokens: int, d_base: int, d_extension: int) -> BatchSelection:
    """Lay out selected (token, latent) pairs, tokens ascending, as one row per token, padded with latent 0."""
    indices_BK, chosen_BK = pad(tokens_N, latents_N, tokens)
    return BatchSelection(parents(indices_BK, d_base, d_extension), chosen_BK)


def kronecker_above(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, thresholds_F: Float[Tensor, " F"], composition: Composition
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return token and latent of every positive composition above its latent's threshold, by token, then latent.

    Only heads that can contain one are expanded: an ordered composition is largest where its parents are.
    """
    heads, width = pre_BHP.shape[1:]
    cells = cells_per_head(d_base, width - d_base, composition.alone is not None)
    thresholds_HC = thresholds_F.clamp_min(0).view(heads, cells)
    lowest_H = thresholds_HC.amin(1)
    none_N = torch.zeros(0, dtype=torch.int64, device=pre_BHP.device)
    tokens, latents, first = [none_N], [none_N], 0
    for part_BHP in pre_BHP.split(max(1, CHUNK_ELEMENTS // heads)):
        can_BH = torch.ones(part_BHP.shape[:2], dtype=torch.bool, device=pre_BHP.device)
        if composition.order != "none":
            can_BH = best_of_head(*head_maxima(part_BHP, d_base), composition) > lowest_H
        for pairs_E2 in can_BH.nonzero().split(max(1, CHUNK_ELEMENTS // cells)):
            token_E, head_E = pairs_E2.unbind(1)
            on_EC = cells_of(part_BHP[token_E, head_E], d_base, composition) > thresholds_HC[head_E]
            entry_N, cell_N = on_EC.nonzero(as_tuple=True)
            tokens.append(first + token_E[entry_N])
            latents.append(head_E[entry_N] * cells + cell_N)
        first += len(part_BHP)
    return torch.cat(tokens), torch.cat(latents)


def cells_of(pre: Float[Tensor, "... P"], d_base: int, composition: Composition) -> Float[Tensor, "... C"]:
    """Return all compositions of each head, ``[..., P] -> [..., C]``: base by base, its pairs and then it alone."""
    u, v = pre[..., :d_base], pre[..., d_base:]
    pairs = composition.function(u.unsqueeze(-1), v.unsqueeze(-2))
    if composition.alone is None:
        return pairs.flatten(-2)
    bases, extensions = composition.alone(u, v.amax(-1, keepdim=True)), composition.alone(v, u.amax(-1, keepdim=True))
    return torch.cat([torch.cat([pairs, bases.unsqueeze(-1)], dim=-1).flatten(-2), extensions], dim=-1)


def pairs_at(
    pre_BP: Float[Tensor, "B P"], indices_BK: Int[Tensor, "B K"], d_base: int, d_extension: int, null: bool = False
) -> ChosenPairs:
    """Return the latents with their parents' rows and values; ``null``: with null symbols (`parents_at`)."""
    selection = parents_at(pre_BP, indices_BK, d_base, d_extension, null)
    rows_BR = torch.cat([selection.base_rows_BK, selection.extension_rows_BK], dim=1)
    return ChosenPairs(selection, rows_BR, pre_BP.gather(1, rows_BR))


def kronecker_linear_topk(
    x_BD: Float[Tensor, "B D"],
    weight_HPD: Float[Tensor, "H P D"],
    bias_HP: Float[Tensor, "H P"],
    d_base: int,
    choices: Sequence[Choice],
    null: bool = False,
) -> list[ChosenPairs]:
    """Make several selections from the heads of ``x W^T + b``; the B x H x P products exist one chunk at a time."""
    return choose_in_chunks(x_BD, weight_HPD, bias_HP, d_base, choices, null, kronecker_topk)


def choose_in_chunks(
    x_BD: Tensor,
    weight_HPD: Tensor,
    bias_HP: Tensor,
    d_base: int,
    choices: Sequence[Choice],
    null: bool,
    among_all: Callable[[Tensor, int, int], KroneckerSelection],
) -> list[ChosenPairs]:
    """Run `kronecker_linear_topk`; ``among_all`` selects among all latents unless heads have null symbols."""
    heads, width, _ = weight_HPD.shape
    weight_PD, bias_P = weight_HPD.flatten(0, 1), bias_HP.flatten()
    parts: list[list[ChosenPairs]] = [[] for _ in choices]
    for _, pre_BP in product_chunks(x_BD, weight_PD, bias_P):
        pre_BHP = pre_BP.view(-1, heads, width)
        for choice, chosen in zip(choices, parts, strict=True):
            if choice.latents_C is None and not null:
                indices_BK = among_all(pre_BHP, d_base, choice.k).indices_BK
            else:
                indices_BK = topk(pre_BHP, d_base, choice, NULL_PRODUCTS if null else PRODUCTS)
            chosen.append(pairs_at(pre_BP, indices_BK, d_base, width - d_base, null))
    return [_join(chosen) for chosen in parts]


def _join(parts: list[ChosenPairs]) -> ChosenPairs:
    selection = KroneckerSelection(*map(torch.cat, zip(*(part.selection for part in parts), strict=True)))
    return ChosenPairs(
        selection, torch.cat([part.rows_BR for part in parts]), torch.cat([part.pre_BR for part in parts])
    )


def linear_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], k: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the k largest outputs of ``x W^T + b`` per token and their rows; outputs exist one chunk at a time."""
    parts = [pre_BP.topk(k, sorted=False) for _, pre_BP in product_chunks(x_BD, weight_PD, bias_P)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def linear_batch_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], total: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the ``total`` largest positive outputs of the batch and their rows; outputs exist one chunk at a time."""

    def candidates() -> Iterator[tuple[Tensor, Tensor]]:
        for first, pre_BP in product_chunks(x_BD, weight_PD, bias_P):
            positive_N = torch.where(pre_BP > 0, pre_BP, 0.0).flatten()
            best = positive_N.topk(min(total, len(positive_N)), sorted=False)
            yield best.values, best.indices + first * len(weight_PD)

    values_N, flat_N = best_of_batch(candidates(), total, x_BD)
    return _padded_outputs(values_N, flat_N // len(weight_PD), flat_N % len(weight_PD), len(x_BD))


def linear_above(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    thresholds_P: Float[Tensor, " P"],
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return every positive output above its threshold, and its row; outputs exist one chunk at a time."""
    long_N = torch.zeros(0, dtype=torch.int64, device=x_BD.device)
    values, tokens, rows = [x_BD.new_zeros(0)], [long_N], [long_N]
    for first, pre_BP in product_chunks(x_BD, weight_PD, bias_P):
        on_BP = pre_BP > thresholds_P.clamp_min(0)
        token_N, row_N = on_BP.nonzero(as_tuple=True)
        values.append(pre_BP[on_BP])
        tokens.append(first + token_N)
        rows.append(row_N)
    return _padded_outputs(torch.cat(values), torch.cat(tokens), torch.cat(rows), len(x_BD))


def _padded_outputs(values_N: Tensor, tokens_N: Tensor, rows_N: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    rows_BK, chosen_BK = pad(tokens_N, rows_N, tokens)
    values_BK = values_N.new_zeros(rows_BK.shape)
    values_BK[chosen_BK] = values_N
    return values_BK, rows_BK


def best_of_batch(
    candidates: Iterable[tuple[Tensor, Tensor]], total: int, like: Tensor
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the ``total`` largest positive candidates, given as values and positions in the batch, by position."""
    values_N, places_N = like.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=like.device)
    for more_values, more_places in candidates:
        positive = more_values > 0
        values_N = torch.cat([values_N, more_values[positive]])
        places_N = torch.cat([places_N, more_places[positive]])
        if len(values_N) > total:
            kept = values_N.topk(total, sorted=False).indices
            values_N, places_N = values_N[kept], places_N[kept]
    places_N, order = places_N.sort()
    return values_N[order], places_N


def weighted_rows(
    weights_BR: Float[Tensor, "B R"],
    rows_BR: Int[Tensor, "B R"],
    matrix_PD: Float[Tensor, "P D"],
    bias_D: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B D"]:
    """Return ``out[b] = bias + sum_r weights[b, r] * matrix[rows[b, r]]`` without the B x R x D tensor of rows."""
    out_BD = embedding_bag(rows_BR, matrix_PD, per_sample_weights=weights_BR, mode="sum")
    return out_BD if bias_D is None else out_BD.add_(bias_D)


def sampled_products(
    x_BD: Float[Tensor, "B D"], matrix_PD: Float[Tensor, "P D"], rows_BR: Int[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return ``out[b, r] = x[b] . matrix[rows[b, r]]``, in chunks of tokens so that the gathered rows stay small."""
    chunk = max(1, CHUNK_ELEMENTS // max(1, rows_BR.shape[1] * matrix_PD.shape[1]))
    parts = zip(x_BD.split(chunk), rows_BR.split(chunk), strict=True)
    return torch.cat([torch.einsum("bd,brd->br", x, matrix_PD[rows]) for x, rows in parts])


def inverse_norms(matrix_FD: Float[Tensor, "F D"]) -> Float[Tensor, " F"]:
    """``1 / |row|``; 0 for a row of zeros."""
    norm_F = torch.linalg.vector_norm(matrix_FD, dim=1)
    return torch.where(norm_F > 0, 1 / norm_F, 0.0)


def pursue(
    target_BD: Float[Tensor, "B D"],
    matrix_FD: Float[Tensor, "F D"],
    values_BC: Float[Tensor, "B C"],
    latents_BC: Int[Tensor, "B C"],
    rounds: PursuitRounds,
) -> Pursued:
    """A pursuit among the candidates of each token, in chunks of tokens: their rows, gathered, stay small."""
    inverse_F = inverse_norms(matrix_FD)
    chunk = max(1, CHUNK_ELEMENTS // (latents_BC.shape[1] * matrix_FD.shape[1]))
    found = []
    for target, z, latents in zip(target_BD.split(chunk), values_BC.split(chunk), latents_BC.split(chunk), strict=True):
        rows_BCD = matrix_FD[latents]
        dictionary = Rows(partial(torch.einsum, "bcd,bd->bc", rows_BCD), partial(torch.einsum, "bcd,bc->bd", rows_BCD))
        found.append(pursue_by(dictionary, inverse_F[latents], target, z, latents, rounds))
    return Pursued(*map(torch.cat, zip(*found, strict=True)))


def group_rows(terms: Sequence[Term], height: int) -> RowGradient:
    """Sort the entries of all terms by row, stably."""
    firsts = [0]
    for term in terms:
        firsts.append(firsts[-1] + len(term.x_BD))
    rows = torch.cat([term.rows_BR.flatten() for term in terms])
    weights = torch.cat([term.weights_BR.flatten() for term in terms])
    tokens = torch.cat([
        torch.arange(first, first + len(term.x_BD), device=rows.device).repeat_interleave(term.rows_BR.shape[1])
        for first, term in zip(firsts, terms, strict=False)
    ])  # fmt: skip
    kept = weights.nonzero().squeeze(1)
    order = rows[kept].sort(stable=True)
    kept = kept[order.indices]
    offsets = torch.zeros(height + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(order.values, minlength=height), 0, out=offsets[1:])
    return RowGradient(offsets, tokens[kept], weights[kept], join_inputs(terms))


def join_inputs(terms: Sequence[Term]) -> Tensor:
    """Concatenate the inputs of all terms."""
    return terms[0].x_BD if len(terms) == 1 else torch.cat([term.x_BD for term in terms])


def gradient_rows(gradient: RowGradient) -> Float[Tensor, "P D"]:
    """Return the gradient as a tensor. Each row sums its tokens in a fixed order, so the bits repeat."""
    return embedding_bag(
        gradient.tokens_N,
        gradient.x_BD,
        gradient.offsets,
        mode="sum",
        per_sample_weights=gradient.weights_N,
        include_last_offset=True,
    )


def squared_norm(gradient: RowGradient) -> Float[Tensor, ""]:
    """Return ``|G|^2`` in float64."""
    return gradient_rows(gradient).square().sum(dtype=torch.float64)


def adamw(
    weight_PD: Float[Tensor, "P D"],
    moment_PD: Float[Tensor, "P D"],
    second_PD: Float[Tensor, "P D"],
    gradient: RowGradient | Float[Tensor, "P D"],
    settings: AdamW,
) -> None:
    """Take one step of `AdamW` in place on the weight and its two moments."""
    grad_PD = gradient_rows(gradient) if isinstance(gradient, RowGradient) else gradient
    if settings.grad_scale != 1:
        grad_PD = grad_PD * settings.grad_scale
    tensors = [weight_PD, moment_PD, second_PD, grad_PD]
    touched = None
    if settings.only_touched and isinstance(gradient, RowGradient):
        touched = gradient.offsets.diff().nonzero().squeeze(1)
        tensors = [tensor[touched] for tensor in tensors]
    weight, moment, second, grad = tensors
    weight.mul_(settings.decay)
    moment.lerp_(grad, 1 - settings.beta1)
    second.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    weight.addcdiv_(moment, second.sqrt().mul_(settings.root_scale).add_(settings.eps), value=-settings.step_size)
    if settings.unit_norm:
        weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny))
    if touched is not None:
        for whole, part in zip((weight_PD, moment_PD, second_PD), (weight, moment, second), strict=True):
            whole[touched] = part
