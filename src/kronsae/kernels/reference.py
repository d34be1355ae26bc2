"""Definition of every operation: materialised, slow, differentiated by autograd.

Training uses nothing from here. Tests compare the fast paths with it, values and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    parents,
    parents_at,
)


def product_chunks(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"]
) -> Iterator[tuple[int, Float[Tensor, "C P"]]]:
    """Yield ``x W^T + b`` as a single chunk."""
    yield 0, x_BD @ weight_PD.T + bias_P


def head_maxima(pre_BHP: Float[Tensor, "B H P"], d_base: int) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
    """Return ``max(0, max_i u_i)`` and ``max(0, max_j v_j)`` of each head."""
    base_BHM, extension_BHN = pre_BHP.relu().split([d_base, pre_BHP.shape[-1] - d_base], dim=-1)
    return base_BHM.amax(-1), extension_BHN.amax(-1)


def kronecker_products(pre_BHP: Float[Tensor, "B H P"], d_base: int) -> Float[Tensor, "B H M N"]:
    """Return ``relu(u_i) * relu(v_j)`` for every head, base i and extension j: one product per latent."""
    base_BHM, extension_BHN = pre_BHP.relu().split([d_base, pre_BHP.shape[-1] - d_base], dim=-1)
    products_BHMN: Tensor = base_BHM.unsqueeze(-1) * extension_BHN.unsqueeze(-2)
    return products_BHMN


def all_cells(pre_BHP: Float[Tensor, "B H P"], d_base: int, composition: Composition) -> Float[Tensor, "B F"]:
    """Return every composition; with null symbols, of a grid of (M + 1) x (N + 1) cells per head without its last."""
    u_BHM, v_BHN = pre_BHP.split([d_base, pre_BHP.shape[-1] - d_base], dim=-1)
    pairs_BHMN = composition.function(u_BHM.unsqueeze(-1), v_BHN.unsqueeze(-2))
    if composition.alone is None:
        return pairs_BHMN.flatten(1)
    grid = pairs_BHMN.new_zeros(*pre_BHP.shape[:2], d_base + 1, v_BHN.shape[-1] + 1)
    grid[..., :-1, :-1] = pairs_BHMN
    grid[..., :-1, -1] = composition.alone(u_BHM, v_BHN.amax(-1, keepdim=True))
    grid[..., -1, :-1] = composition.alone(v_BHN, u_BHM.amax(-1, keepdim=True))
    return grid.flatten(2)[..., :-1].flatten(1)


def kronecker_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int) -> KroneckerSelection:
    """Select the k largest of all ``H*M*N`` products of each token; ties go to the smaller index."""
    products_BF = kronecker_products(pre_BHP, d_base).flatten(1)
    return parents(_sorted_topk(products_BF, k), d_base, pre_BHP.shape[-1] - d_base)


def kronecker_topk_among(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int, latents_C: Int[Tensor, " C"]
) -> KroneckerSelection:
    """Select the k largest products among the listed latents of each token; ties go to the smaller index."""
    latents_C = latents_C.sort().values
    products_BC = kronecker_products(pre_BHP, d_base).flatten(1)[:, latents_C]
    return parents(latents_C[_sorted_topk(products_BC, k)], d_base, pre_BHP.shape[-1] - d_base)


def kronecker_batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int) -> BatchSelection:
    """Select the ``total`` largest positive products of the batch; ties go to the earlier token, then the latent."""
    products_BF = kronecker_products(pre_BHP, d_base).flatten(1)
    indices_BK, chosen_BK = _pad_rows(_mark_largest_of_batch(products_BF, total))
    return BatchSelection(parents(indices_BK, d_base, pre_BHP.shape[-1] - d_base), chosen_BK)


def kronecker_above(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, thresholds_F: Float[Tensor, " F"], composition: Composition
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return token and latent of every positive composition above its latent's threshold, by token, then latent."""
    z_BF = all_cells(pre_BHP, d_base, composition)
    tokens_N, latents_N = ((z_BF > 0) & (z_BF > thresholds_F)).nonzero(as_tuple=True)
    return tokens_N, latents_N


def _mark_largest_of_batch(values_BF: Tensor, total: int) -> Tensor:
    """Mark the ``total`` largest values, if positive; ties go to the earlier token, then the smaller latent."""
    positive_BF = torch.where(values_BF > 0, values_BF, 0.0)
    order = positive_BF.flatten().sort(stable=True, descending=True).indices[:total]
    chosen_BF = torch.zeros_like(positive_BF, dtype=torch.bool)
    chosen_BF.view(-1)[order] = True
    return chosen_BF & (positive_BF > 0)


def _pad_rows(chosen_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Return selected latents, ascending and padded with latent 0 to the longest row, and a mask without padding."""
    width = max(1, int(chosen_BF.sum(1).max())) if len(chosen_BF) else 1
    chosen_BK, indices_BK = chosen_BF.to(torch.int8).sort(dim=1, stable=True, descending=True)
    chosen_BK, indices_BK = chosen_BK[:, :width].bool(), indices_BK[:, :width]
    return indices_BK.masked_fill(~chosen_BK, 0), chosen_BK


def _sorted_topk(values_BF: Tensor, k: int) -> Tensor:
    return values_BF.sort(dim=1, stable=True, descending=True).indices[:, :k]


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
    """Select the k largest from ``x W^T + b``, of all or of the listed latents; ties go to the smaller index."""
    pre_BHP = torch.einsum("bd,hpd->bhp", x_BD, weight_HPD) + bias_HP
    z_BF = all_cells(pre_BHP, d_base, NULL_PRODUCTS if null else PRODUCTS)
    results = []
    for k, latents_C in choices:
        listed_C = torch.arange(z_BF.shape[1], device=z_BF.device) if latents_C is None else latents_C.sort().values
        indices_BK = listed_C[_sorted_topk(z_BF[:, listed_C], k)]
        results.append(pairs_at(pre_BHP.flatten(1), indices_BK, d_base, pre_BHP.shape[-1] - d_base, null))
    return results


def linear_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], k: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the k largest of ``relu(x W^T + b)`` per token, as outputs before ReLU, and their rows."""
    pre_BP = x_BD @ weight_PD.T + bias_P
    rows_BK = _sorted_topk(pre_BP.relu(), k)
    return pre_BP.gather(1, rows_BK), rows_BK


def linear_batch_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], total: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the ``total`` largest positive outputs of a batch and their rows; ties go to the earlier token, row."""
    pre_BP = x_BD @ weight_PD.T + bias_P
    return _pad_outputs(pre_BP, _mark_largest_of_batch(pre_BP, total))


def linear_above(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    thresholds_P: Float[Tensor, " P"],
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return every positive output above its threshold, and its row."""
    pre_BP = x_BD @ weight_PD.T + bias_P
    return _pad_outputs(pre_BP, (pre_BP > 0) & (pre_BP > thresholds_P))


def _pad_outputs(pre_BP: Tensor, chosen_BP: Tensor) -> tuple[Tensor, Tensor]:
    rows_BK, chosen_BK = _pad_rows(chosen_BP)
    return torch.where(chosen_BK, pre_BP.gather(1, rows_BK), 0.0), rows_BK


def linear_at(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    rows_BR: Int[Tensor, "B R"],
) -> Float[Tensor, "B R"]:
    """Return the outputs ``rows`` of the linear layer ``x W^T + b``; differentiable."""
    return (x_BD @ weight_PD.T + bias_P).gather(1, rows_BR)


def decode(
    values_BK: Float[Tensor, "B K"],
    indices_BK: Int[Tensor, "B K"],
    W_dec_FD: Float[Tensor, "F D"],
    b_dec_D: Float[Tensor, " D"],
) -> Float[Tensor, "B D"]:
    """Return ``f W_dec + b_dec`` with f the dense B x F activations; the values of a repeated index add up."""
    return weighted_rows(values_BK, indices_BK, W_dec_FD, b_dec_D)


def _to_dense(weights_BR: Tensor, rows_BR: Tensor, height: int) -> Tensor:
    return weights_BR.new_zeros(len(weights_BR), height).scatter_add(1, rows_BR, weights_BR)


def weighted_rows(
    weights_BR: Float[Tensor, "B R"],
    rows_BR: Int[Tensor, "B R"],
    matrix_PD: Float[Tensor, "P D"],
    bias_D: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B D"]:
    """Return the product of the weights, as a B x P matrix, and the matrix."""
    out_BD = _to_dense(weights_BR, rows_BR, len(matrix_PD)) @ matrix_PD
    return out_BD if bias_D is None else out_BD + bias_D


def sampled_products(
    x_BD: Float[Tensor, "B D"], matrix_PD: Float[Tensor, "P D"], rows_BR: Int[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return the entries ``rows`` of ``x matrix^T``."""
    return (x_BD @ matrix_PD.T).gather(1, rows_BR)


def pursue(
    target_BD: Float[Tensor, "B D"],
    matrix_FD: Float[Tensor, "F D"],
    values_BC: Float[Tensor, "B C"],
    latents_BC: Int[Tensor, "B C"],
    rounds: PursuitRounds,
) -> Pursued:
    """One token after another, with codes of all F latents: round, residual, refit, as `kronsae.core.pursuit` says.

    With ``e = target - z matrix`` and ``g_f = <d_f, e> / |d_f|``, the first round takes the largest values and each
    further one the largest positive g of the candidates left, which start at ``start * g_f / |d_f|``; of equal ones
    the smaller latent comes first. A refit step changes all chosen at once, along g plus what conjugate gradients keep
    of the last direction, as far as ``|e|`` falls. Where a value would become negative, the changes are cut so that it
    becomes 0, and the cut changes are scaled by the factor from 0 to 1 at which ``|e|`` is smallest.
    """
    k = sum(rounds.sizes)
    out = Pursued(
        values_BC.new_zeros(len(values_BC), k), *(latents_BC.new_full((len(values_BC), k), n) for n in (0, -1))
    )
    norm_F = matrix_FD.norm(dim=1)
    inverse_F = torch.where(norm_F > 0, 1 / norm_F, 0.0)
    for b, target_D in enumerate(target_BD):
        if not bool(values_BC[b].isfinite().all()):
            out.values_BK[b] = torch.nan
            continue
        place_of = {int(latents_BC[b, c]): c for c in range(latents_BC.shape[1]) if values_BC[b, c] > 0}
        left, column_of = sorted(place_of), dict[int, int]()
        z_F = values_BC.new_zeros(len(matrix_FD))
        column = 0
        for number, size in enumerate(rounds.sizes):
            g_F = matrix_FD @ (target_D - z_F @ matrix_FD) * inverse_F
            worth = {f: float(values_BC[b, place_of[f]] if number == 0 else g_F[f]) for f in left}
            best = sorted((f for f in left if worth[f] > 0), key=lambda f: (-worth[f], f))[:size]
            for f in sorted(best, key=place_of.__getitem__):
                column_of[f] = column + len(column_of.keys() & set(best))
                z_F[f] = values_BC[b, place_of[f]] if number == 0 else rounds.start * g_F[f] * inverse_F[f]
            left = [f for f in left if f not in column_of]
            column += size
            last_F = s_F = torch.zeros_like(z_F)
            for step in range(rounds.steps[number]):
                e_D = target_D - z_F @ matrix_FD
                g_F = torch.zeros_like(z_F)
                for f in column_of:
                    g_F[f] = matrix_FD[f] @ e_D * inverse_F[f]
                    if z_F[f] == 0 and g_F[f] <= 0:
                        g_F[f] = 0
                change = g_F @ (g_F - last_F)
                memory = change / (last_F @ last_F) if step > 0 and change > 0 and last_F.any() else 0.0
                s_F = torch.where((z_F > 0) | (g_F > 0), g_F + memory * s_F, 0.0)
                moved_D = (s_F * inverse_F) @ matrix_FD
                share = (moved_D @ e_D) / (moved_D @ moved_D) if moved_D.any() else 0.0
                reached_F, last_F = z_F + share * s_F * inverse_F, g_F
                if (reached_F < 0).any():
                    moved_D = (reached_F.relu() - z_F) @ matrix_FD
                    share = float((moved_D @ e_D) / (moved_D @ moved_D)) if moved_D.any() else 0.0
                    reached_F = z_F + min(1.0, max(0.0, share)) * (reached_F.relu() - z_F)
                    last_F = torch.zeros_like(g_F)
                z_F = reached_F
        for f, place in column_of.items():
            out.values_BK[b, place], out.latents_BK[b, place], out.places_BK[b, place] = z_F[f], f, place_of[f]
    return out


def group_rows(terms: Sequence[Term], height: int) -> RowGradient:
    """Collect the entries of each row, one row after another."""
    offsets, tokens, weights = [0], [], []
    for row in range(height):
        first_token = 0
        for term in terms:
            for token, place in ((term.rows_BR == row) & (term.weights_BR != 0)).nonzero().tolist():
                tokens.append(first_token + token)
                weights.append(term.weights_BR[token, place])
            first_token += len(term.x_BD)
        offsets.append(len(tokens))
    x_BD = torch.cat([term.x_BD for term in terms])
    weights_N = torch.stack(weights) if weights else x_BD.new_zeros(0)
    long = {"dtype": torch.int64, "device": x_BD.device}
    return RowGradient(torch.tensor(offsets, **long), torch.tensor(tokens, **long), weights_N, x_BD)  # type: ignore[arg-type]


def gradient_rows(gradient: RowGradient) -> Float[Tensor, "P D"]:
    """Return ``G = A^T x`` with A the B x P matrix of the entries."""
    rows_N = torch.arange(gradient.height, device=gradient.x_BD.device).repeat_interleave(gradient.offsets.diff())
    A_BP = gradient.x_BD.new_zeros(len(gradient.x_BD), gradient.height)
    A_BP.index_put_((gradient.tokens_N, rows_N), gradient.weights_N, accumulate=True)
    return A_BP.T @ gradient.x_BD


def squared_norm(gradient: RowGradient) -> Float[Tensor, ""]:
    """Return ``|G|^2`` in float64."""
    return gradient_rows(gradient).double().square().sum()


def adamw(
    weight_PD: Float[Tensor, "P D"],
    moment_PD: Float[Tensor, "P D"],
    second_PD: Float[Tensor, "P D"],
    gradient: RowGradient | Float[Tensor, "P D"],
    settings: AdamW,
) -> None:
    """Apply the formula of `AdamW` in place."""
    grad_PD = gradient_rows(gradient) if isinstance(gradient, RowGradient) else gradient
    grad_PD = grad_PD * settings.grad_scale
    moment = settings.beta1 * moment_PD + (1 - settings.beta1) * grad_PD
    second = settings.beta2 * second_PD + (1 - settings.beta2) * grad_PD.square()
    root = (second / (1 - settings.beta2**settings.step)).sqrt()
    update = settings.lr / (1 - settings.beta1**settings.step) * moment / (root + settings.eps)
    weight = weight_PD * (1 - settings.lr * settings.weight_decay) - update
    if settings.unit_norm:
        norm = weight.norm(dim=1, keepdim=True)
        weight = torch.where(norm > 0, weight / norm, weight)
    touched_P = torch.ones(len(weight_PD), dtype=torch.bool, device=weight_PD.device)
    if settings.only_touched and isinstance(gradient, RowGradient):
        touched_P = gradient.offsets.diff() > 0
    for whole, new in zip((weight_PD, moment_PD, second_PD), (weight, moment, second), strict=True):
        whole.copy_(torch.where(touched_P.unsqueeze(1), new, whole))
