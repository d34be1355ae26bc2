"""Differentiable operations on the path that `dispatch` selects, and weight gradients kept as entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.kernels.dispatch import choose
from kronsae.kernels.rows import AdamW, RowGradient, Term
from kronsae.kernels.selection import BatchSelection, Choice, ChosenPairs, KroneckerSelection, Pursued, PursuitRounds


class RowGradients:
    """Weight gradients of the backward passes inside `collect_row_gradients`: one `RowGradient` per parameter.

    A parameter whose gradient is collected here keeps ``.grad`` None. All other gradients go to ``.grad`` as usual.
    """

    def __init__(self) -> None:
        self._terms: dict[Tensor, list[Term]] = {}
        self._grouped: dict[Tensor, RowGradient] = {}

    def add(self, parameter: Tensor, term: Term) -> None:
        """Add the gradient of one backward pass. Its tensors are detached, so the graph can be freed."""
        cut = Term(term.weights_BR.detach(), term.rows_BR, term.x_BD.detach())
        self._terms.setdefault(parameter, []).append(cut)
        self._grouped.pop(parameter, None)

    def get(self, parameter: Tensor) -> RowGradient | None:
        """Return the gradient of ``parameter``, as rows of its last dimension; None if none was collected."""
        terms = self._terms.get(parameter)
        if terms is None:
            return None
        if parameter not in self._grouped:
            group = choose("group_rows", parameter)
            self._grouped[parameter] = group(terms, parameter.numel() // parameter.shape[-1])
        return self._grouped[parameter]

    def terms(self, parameter: Tensor) -> tuple[Term, ...]:
        """Return the gradients of ``parameter`` that were added, one per backward pass of an operation."""
        return tuple(self._terms.get(parameter, ()))

    def replace(self, parameter: Tensor, terms: Sequence[Term]) -> None:
        """Replace the gradient of ``parameter`` by the sum of these terms; without terms it has none here."""
        self._terms.pop(parameter, None)
        self._grouped.pop(parameter, None)
        if terms:
            self._terms[parameter] = list(terms)

    def squared_norm(self, parameter: Tensor) -> Float[Tensor, ""]:
        """Return ``|gradient|^2`` of one parameter in float64, on the CPU or the parameter's device."""
        gradient = self.get(parameter)
        if gradient is None:
            return torch.zeros((), dtype=torch.float64, device=parameter.device)
        return cast(Tensor, choose("squared_norm", parameter)(gradient))

    def materialize(self) -> None:
        """Add all gradients to ``.grad`` as dense tensors, for optimisers that need these, and clear."""
        for parameter in list(self._terms):
            self.materialize_one(parameter)

    def materialize_one(self, parameter: Tensor) -> None:
        """Move the gradient of one parameter to its ``.grad``."""
        gradient = self.get(parameter)
        if gradient is not None:
            dense = choose("gradient_rows", parameter)(gradient).view_as(parameter)
            parameter.grad = dense if parameter.grad is None else parameter.grad + dense
            self.replace(parameter, ())

    def clear(self) -> None:
        """Remove all gradients."""
        self._terms.clear()
        self._grouped.clear()


_collector: ContextVar[RowGradients | None] = ContextVar("kronsae_row_gradients", default=None)


@contextmanager
def collect_row_gradients(into: RowGradients | None = None) -> Iterator[RowGradients]:
    """Keep the weight gradients of `decode` and `linear_at` as entries instead of dense ``.grad`` tensors.

    The forward pass must run inside the block. This applies to weights that are leaves or reshaped leaves; any other
    weight gets its gradient through autograd as usual.

    Args:
        into: gradients to add to, to accumulate several batches.
    """
    gradients = RowGradients() if into is None else into
    token = _collector.set(gradients)
    try:
        yield gradients
    finally:
        _collector.reset(token)


def _destination(weight: Tensor) -> tuple[RowGradients, Tensor] | None:
    """Return the collector and the parameter for the entries of this weight's gradient; None if not collected."""
    gradients = _collector.get()
    if gradients is None or not weight.requires_grad:
        return None
    if weight.is_leaf:
        return gradients, weight
    base = weight._base
    if (
        base is not None
        and base.is_leaf
        and base.numel() == weight.numel()
        and base.shape[-1] == weight.shape[-1]
        and base.is_contiguous()
        and weight.is_contiguous()
    ):
        return gradients, base
    return None


def _weight_gradient(destination: Any, term: Term, height: int) -> Tensor | None:
    if destination is None:
        grouped = choose("group_rows", term.x_BD)([term], height)
        return cast(Tensor, choose("gradient_rows", term.x_BD)(grouped))
    gradients, parameter = destination
    gradients.add(parameter, term)
    return None


def _sums_at(rows_N: Tensor, values_N: Tensor, height: int) -> Tensor:
    """Return ``out[p] = sum of the values at row p``, with the same bits each time."""
    out_P = values_N.new_zeros(height)
    if values_N.is_cuda:  # there index_add_ adds in no fixed order, while accumulating by index sorts first
        return out_P.index_put_((rows_N,), values_N, accumulate=True)
    return out_P.index_add_(0, rows_N, values_N)


# The backward pass of a GPU runs in a thread of autograd's own, which knows no `kronsae.kernels.use`. So both functions
# run it in the context of their forward pass.


class _LinearAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        weight_PD: Tensor,
        bias_P: Tensor,
        rows_BR: Tensor,
        values_BR: Tensor,
        destination: Any,
    ) -> Tensor:
        ctx.save_for_backward(x_BD, weight_PD, rows_BR)
        ctx.destination, ctx.context = destination, copy_context()
        return values_BR.clone()

    @staticmethod
    def backward(ctx: Any, grad_BR: Tensor) -> Any:
        return ctx.context.copy().run(_LinearAt.gradients, ctx, grad_BR)

    @staticmethod
    def gradients(ctx: Any, grad_BR: Tensor) -> Any:
        x_BD, weight_PD, rows_BR = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_BR = grad_BR.contiguous()
        grad_x = choose("weighted_rows", x_BD)(grad_BR, rows_BR, weight_PD) if needs_x else None
        grad_weight = grad_bias = None
        if needs_weight:
            term = Term(grad_BR, rows_BR, x_BD)
            grad_weight = _weight_gradient(ctx.destination, term, len(weight_PD))
        if needs_bias:
            grad_bias = _sums_at(rows_BR.flatten(), grad_BR.flatten(), len(weight_PD))
        return grad_x, grad_weight, grad_bias, None, None, None


def linear_at(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    rows_BR: Int[Tensor, "B R"],
    values_BR: Float[Tensor, "B R"],
) -> Float[Tensor, "B R"]:
    """Attach the gradient to ``values = (x W^T + b)[rows]``, which was computed without a graph.

    The weight's gradient is a sum over R rows per token instead of a dense product over all P. The gradients of a
    repeated row add up.
    """
    destination = _destination(weight_PD)
    return cast(Tensor, _LinearAt.apply(x_BD, weight_PD, bias_P, rows_BR, values_BR, destination))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, destination: Any
    ) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, W_dec_FD)
        ctx.destination, ctx.context = destination, copy_context()
        return cast(Tensor, choose("weighted_rows", W_dec_FD)(values_BK, indices_BK, W_dec_FD, b_dec_D))

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> Any:
        return ctx.context.copy().run(_Decode.gradients, ctx, grad_BD)

    @staticmethod
    def gradients(ctx: Any, grad_BD: Tensor) -> Any:
        values_BK, indices_BK, W_dec_FD = ctx.saved_tensors
        needs_values, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grad_BD = grad_BD.contiguous()
        grad_values = grad_weight = None
        if needs_values:
            grad_values = choose("sampled_products", W_dec_FD)(grad_BD, W_dec_FD, indices_BK)
        if needs_weight:
            term = Term(values_BK, indices_BK, grad_BD)
            grad_weight = _weight_gradient(ctx.destination, term, len(W_dec_FD))
        return grad_values, None, grad_weight, grad_BD.sum(0) if needs_bias else None, None


def decode(
    values_BK: Float[Tensor, "B K"],
    indices_BK: Int[Tensor, "B K"],
    W_dec_FD: Float[Tensor, "F D"],
    b_dec_D: Float[Tensor, " D"],
) -> Float[Tensor, "B D"]:
    """Return ``sum_k values_k W_dec[indices_k] + b_dec``; reads K rows of the decoder per token."""
    destination = _destination(W_dec_FD)
    return cast(Tensor, _Decode.apply(values_BK, indices_BK, W_dec_FD, b_dec_D, destination))


@torch.no_grad()
def kronecker_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int) -> KroneckerSelection:
    """Select the k largest of ``relu(u_i) relu(v_j)`` over all heads of each token, exactly; not differentiable.

    Zeros fill up if fewer than k products are positive. The order within a token has no meaning.
    """
    return cast(KroneckerSelection, choose("kronecker_topk", pre_BHP)(pre_BHP, d_base, k))


@torch.no_grad()
def kronecker_topk_among(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int, latents_C: Int[Tensor, " C"]
) -> KroneckerSelection:
    """Select as `kronecker_topk` from the given latents only (AuxK: the dead latents); ``k <= C``."""
    operation = choose("kronecker_topk_among", pre_BHP)
    return cast(KroneckerSelection, operation(pre_BHP, d_base, k, latents_C))


@torch.no_grad()
def kronecker_batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int) -> BatchSelection:
    """Select the ``total`` (such as B * k) largest positive products of the whole batch, exactly (BatchTopK)."""
    return cast(BatchSelection, choose("kronecker_batch_topk", pre_BHP)(pre_BHP, d_base, total))


def kronecker_linear_topk(
    x_BD: Float[Tensor, "B D"],
    weight_HPD: Float[Tensor, "H P D"],
    bias_HP: Float[Tensor, "H P"],
    d_base: int,
    choices: Sequence[Choice],
    null: bool = False,
) -> list[ChosenPairs]:
    """Compute ``x W^T`` and make several choices from its heads, ranked by products; ``null``: by `NULL_PRODUCTS`.

    The B x H x P pre-latents exist one chunk at a time. The values of the selected pairs are differentiable with
    respect to x, weight and bias.
    """
    with torch.no_grad():
        operation = choose("kronecker_linear_topk", weight_HPD)
        results: list[ChosenPairs] = operation(x_BD, weight_HPD, bias_HP, d_base, choices, null)
    if not torch.is_grad_enabled():
        return results
    weight_PD, bias_P = weight_HPD.flatten(0, 1), bias_HP.flatten()
    return [
        ChosenPairs(selection, rows_BR, linear_at(x_BD, weight_PD, bias_P, rows_BR, pre_BR))
        for selection, rows_BR, pre_BR in results
    ]


@torch.no_grad()
def linear_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], k: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the k largest of ``relu(x W^T + b)`` per token, as outputs before ReLU, and their rows.

    The B x P outputs exist one chunk at a time. Not differentiable: pass the result to `linear_at`. If fewer than k
    outputs are positive, the rest are arbitrary outputs that are not positive.
    """
    return cast(tuple[Tensor, Tensor], choose("linear_topk", weight_PD)(x_BD, weight_PD, bias_P, k))


@torch.no_grad()
def linear_batch_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], total: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the ``total`` largest positive outputs of ``x W^T + b`` over the batch, and their rows.

    K is the largest number of outputs of a token, at least 1; the rest of a token's entries are row 0 with value 0. As
    for `linear_topk`, the outputs exist one chunk at a time and are not differentiable.
    """
    return cast(tuple[Tensor, Tensor], choose("linear_batch_topk", weight_PD)(x_BD, weight_PD, bias_P, total))


@torch.no_grad()
def linear_above(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    thresholds_P: Float[Tensor, " P"],
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return every positive output of ``x W^T + b`` above its threshold, and its row; padded as `linear_batch_topk`."""
    return cast(tuple[Tensor, Tensor], choose("linear_above", weight_PD)(x_BD, weight_PD, bias_P, thresholds_P))


@torch.no_grad()
def sampled_products(
    x_BD: Float[Tensor, "B D"], matrix_PD: Float[Tensor, "P D"], rows_BR: Int[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return ``x[b] . matrix[rows[b, r]]``, R dot products per token; not differentiable."""
    return cast(Tensor, choose("sampled_products", matrix_PD)(x_BD, matrix_PD, rows_BR))


@torch.no_grad()
def pursue(
    target_BD: Float[Tensor, "B D"],
    matrix_FD: Float[Tensor, "F D"],
    values_BC: Float[Tensor, "B C"],
    latents_BC: Int[Tensor, "B C"],
    rounds: PursuitRounds,
) -> Pursued:
    """The pursuit of `kronsae.core.pursuit` among the C candidates of each token; not differentiable.

    Args:
        target_BD: what is to be written, less the bias.
        matrix_FD: the dictionary; only the rows of candidates are read.
        values_BC: the candidates' values; those of 0 are padding.
        latents_BC: the candidates.
        rounds: what is done.
    """
    return cast(Pursued, choose("pursue", matrix_FD)(target_BD, matrix_FD, values_BC, latents_BC, rounds))


@torch.no_grad()
def adamw(weight: Tensor, moment: Tensor, second: Tensor, gradient: RowGradient | Tensor, settings: AdamW) -> None:
    """Take one step of `AdamW` in place on a weight and its two moments, as rows of the last dimension."""
    rows = [tensor.view(-1, tensor.shape[-1]) for tensor in (weight, moment, second)]
    if isinstance(gradient, Tensor):
        gradient = gradient.reshape(rows[0].shape)
    choose("adamw", weight)(*rows, gradient, settings)
