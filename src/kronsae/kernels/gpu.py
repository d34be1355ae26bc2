# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"
"""GPU path: Triton kernels where PyTorch has no single operation; the rest comes from `portable`.

Sums run in float32 (float64 for float64 inputs) whatever the dtype of the inputs. There are no atomics: one program
writes each output element and adds in a fixed order, so results repeat bit for bit. With ``TRITON_INTERPRET=1`` the
kernels run on CPU tensors; the tests without a GPU use this, and compile every kernel (`kronsae.bench.compiled`). Block
sizes come from `kronsae.kernels.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.kernels import portable
from kronsae.kernels.blocks import Blocks, blocks_for
from kronsae.kernels.portable import (
    group_rows,
    head_maxima,
    kronecker_above,
    kronecker_batch_topk,
    kronecker_topk_among,
    linear_above,
    linear_batch_topk,
    linear_topk,
    pairs_at,
    product_chunks,
    pursue,
)
from kronsae.kernels.rows import AdamW, RowGradient
from kronsae.kernels.selection import Choice, ChosenPairs, KroneckerSelection, parents

__all__ = [
    "adamw",
    "gradient_rows",
    "group_rows",
    "head_maxima",
    "kronecker_above",
    "kronecker_batch_topk",
    "kronecker_linear_topk",
    "kronecker_topk",
    "kronecker_topk_among",
    "linear_above",
    "linear_batch_topk",
    "linear_topk",
    "pairs_at",
    "product_chunks",
    "pursue",
    "sampled_products",
    "squared_norm",
    "weighted_rows",
]

Launch = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object]
"""Receives a launch: kernel, grid, arguments, and the constants and options by name."""

_receiver: ContextVar[Launch | None] = ContextVar("kronsae_launches", default=None)


@contextmanager
def launches_to(receive: Launch) -> Iterator[None]:
    """Pass every launch inside the block to ``receive`` instead, to compile ahead of time; outputs are unset."""
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch on the device of the first argument, which need not be the current one."""
    receive = _receiver.get()
    if receive is not None:
        receive(kernel, grid, arguments, constants)
    elif 0 in grid:
        return
    elif arguments[0].is_cuda:
        with torch.cuda.device(arguments[0].device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def _blocks(kernel: str, like: Tensor, width: int) -> Blocks:
    return blocks_for(kernel, like.dtype, width, like.device)


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _weighted_rows_kernel(
    weights, rows, matrix, bias, out, entries, width,
    has_bias: tl.constexpr, block: tl.constexpr, acc_type: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * block + tl.arange(0, block)
    inside = d < width
    total = tl.zeros((block,), acc_type)
    if has_bias:
        total += tl.load(bias + d, mask=inside, other=0).to(acc_type)
    for r in tl.range(0, entries, loop_unroll_factor=4):  # four rows in flight
        weight = tl.load(weights + token * entries + r).to(acc_type)
        row = tl.load(rows + token * entries + r)
        total += weight * tl.load(matrix + row * width + d, mask=inside, other=0).to(acc_type)
    tl.store(out + token * width + d, total.to(out.dtype.element_ty), mask=inside)


def weighted_rows(
    weights_BR: Float[Tensor, "B R"],
    rows_BR: Int[Tensor, "B R"],
    matrix_PD: Float[Tensor, "P D"],
    bias_D: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B D"]:
    """Return ``out[b] = bias + sum_r weights[b, r] * matrix[rows[b, r]]``."""
    tokens, entries = rows_BR.shape
    width = matrix_PD.shape[1]
    out_BD = torch.empty(tokens, width, dtype=matrix_PD.dtype, device=matrix_PD.device)
    matrix_PD = matrix_PD.contiguous()
    sizes = _blocks("weighted_rows", matrix_PD, width)
    _launch(
        _weighted_rows_kernel, (tokens, triton.cdiv(width, sizes.block)),
        weights_BR.contiguous(), rows_BR.contiguous(), matrix_PD, matrix_PD if bias_D is None else bias_D.contiguous(),
        out_BD, entries, width, has_bias=bias_D is not None, block=sizes.block,
        acc_type=_accumulator(matrix_PD.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    return out_BD


@triton.jit
def _sampled_products_kernel(
    x, matrix, rows, out, entries, width,
    block_r: tl.constexpr, block: tl.constexpr, acc_type: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * block_r + tl.arange(0, block_r)
    wanted = r < entries
    row = tl.load(rows + token * entries + r, mask=wanted, other=0)
    total = tl.zeros((block_r, block), acc_type)  # summed over its columns once, at the end
    for start in range(0, width, block):
        d = start + tl.arange(0, block)
        inside = d < width
        x_part = tl.load(x + token * width + d, mask=inside, other=0).to(acc_type)
        there = wanted[:, None] & inside[None, :]
        tile = tl.load(matrix + row[:, None] * width + d[None, :], mask=there, other=0).to(acc_type)
        total += tile * x_part[None, :]
    tl.store(out + token * entries + r, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=wanted)


def sampled_products(
    x_BD: Float[Tensor, "B D"], matrix_PD: Float[Tensor, "P D"], rows_BR: Int[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return ``out[b, r] = x[b] . matrix[rows[b, r]]``."""
    tokens, entries = rows_BR.shape
    out_BR = torch.empty(tokens, entries, dtype=matrix_PD.dtype, device=matrix_PD.device)
    sizes = _blocks("sampled_products", matrix_PD, matrix_PD.shape[1])
    _launch(
        _sampled_products_kernel, (tokens, triton.cdiv(entries, sizes.rows)),
        x_BD.contiguous(), matrix_PD.contiguous(), rows_BR.contiguous(), out_BR, entries, matrix_PD.shape[1],
        block_r=sizes.rows, block=sizes.block, acc_type=_accumulator(matrix_PD.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    return out_BR


@triton.jit
def _row_sum(tokens, weights, x, first, count, d, width, block: tl.constexpr, acc_type: tl.constexpr):
    """``sum over the row's entries (t, w) of w * x[t, d]``, in order of entries."""
    inside = d < width
    total = tl.zeros((block,), acc_type)
    for n in tl.range(0, count, loop_unroll_factor=2):
        token = tl.load(tokens + first + n)
        weight = tl.load(weights + first + n).to(acc_type)
        total += weight * tl.load(x + token * width + d, mask=inside, other=0).to(acc_type)
    return total


@triton.jit
def _gradient_rows_kernel(
    offsets, tokens, weights, x, out, width, block: tl.constexpr, acc_type: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * block + tl.arange(0, block)
    first = tl.load(offsets + row)
    count = (tl.load(offsets + row + 1) - first).to(tl.int32)
    total = _row_sum(tokens, weights, x, first, count, d, width, block, acc_type)
    tl.store(out + row * width + d, total.to(out.dtype.element_ty), mask=d < width)


def gradient_rows(gradient: RowGradient) -> Float[Tensor, "P D"]:
    """Return the gradient as a tensor; every row is written."""
    x_BD = gradient.x_BD.contiguous()
    width = x_BD.shape[1]
    out_PD = torch.empty(gradient.height, width, dtype=x_BD.dtype, device=x_BD.device)
    sizes = _blocks("gradient_rows", x_BD, width)
    _launch(
        _gradient_rows_kernel, (gradient.height, triton.cdiv(width, sizes.block)),
        gradient.offsets, gradient.tokens_N, gradient.weights_N, x_BD, out_PD, width,
        block=sizes.block, acc_type=_accumulator(x_BD.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    return out_PD


@triton.jit
def _row_squares_kernel(
    offsets, tokens, weights, x, out, width, block: tl.constexpr, acc_type: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + row)
    count = (tl.load(offsets + row + 1) - first).to(tl.int32)
    squares = tl.zeros((block,), acc_type)
    for start in range(0, tl.where(count > 0, width, 0), block):
        total = _row_sum(tokens, weights, x, first, count, start + tl.arange(0, block), width, block, acc_type)
        squares += total * total
    tl.store(out + row, tl.sum(squares, axis=0))


def squared_norm(gradient: RowGradient) -> Float[Tensor, ""]:
    """Return ``|G|^2`` in float64, from one sum per row; G is not written."""
    x_BD = gradient.x_BD.contiguous()
    dtype = torch.float64 if x_BD.dtype == torch.float64 else torch.float32
    squares_P = torch.empty(gradient.height, dtype=dtype, device=x_BD.device)
    sizes = _blocks("row_squares", x_BD, x_BD.shape[1])
    _launch(
        _row_squares_kernel, (gradient.height,),
        gradient.offsets, gradient.tokens_N, gradient.weights_N, x_BD, squares_P, x_BD.shape[1],
        block=sizes.block, acc_type=_accumulator(x_BD.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    return squares_P.sum(dtype=torch.float64)


@triton.jit
def _head_bounds_kernel(
    pre, best, heads,
    d_base: tl.constexpr, d_extension: tl.constexpr, block_h: tl.constexpr, block_w: tl.constexpr,
    acc_type: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_h + tl.arange(0, block_h)
    column = tl.arange(0, block_w)
    width: tl.constexpr = d_base + d_extension
    tile = pre + (token * heads + head[:, None]) * width + column[None, :]
    inside = (head[:, None] < heads) & (column[None, :] < width)
    values = tl.load(tile, mask=inside, other=0).to(acc_type)
    is_base = column[None, :] < d_base
    base = tl.max(tl.where(is_base & (values > 0), values, 0), axis=1)
    extension = tl.max(tl.where((column[None, :] >= d_base) & (values > 0), values, 0), axis=1)
    tl.store(best + token * heads + head, (base * extension).to(best.dtype.element_ty), mask=head < heads)


@triton.jit
def _expand_kernel(
    pre, chosen, products, heads, expanded,
    d_base: tl.constexpr, d_extension: tl.constexpr, block: tl.constexpr, acc_type: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    cells: tl.constexpr = d_base * d_extension
    inside = at < expanded * cells
    head = tl.load(chosen + token * expanded + at // cells, mask=inside, other=0)
    cell = at % cells
    first = pre + (token * heads + head) * (d_base + d_extension)
    base = tl.load(first + cell // d_extension, mask=inside, other=0).to(acc_type)
    extension = tl.load(first + d_base + cell % d_extension, mask=inside, other=0).to(acc_type)
    product = tl.where((base > 0) & (extension > 0), base * extension, 0)
    tl.store(products + token * expanded * cells + at, product.to(products.dtype.element_ty), mask=inside)


def kronecker_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int) -> KroneckerSelection:
    """Select the k largest products of each token from the k heads with the largest bound."""
    heads, width = pre_BHP.shape[1:]
    expanded = min(k, heads)
    chunk = max(1, 16 * portable.CHUNK_ELEMENTS // (expanded * d_base * (width - d_base)))
    indices = [_topk_chunk(part.contiguous(), d_base, k, expanded) for part in pre_BHP.split(chunk)]
    return parents(torch.cat(indices), d_base, width - d_base)


def _topk_chunk(pre_BHP: Tensor, d_base: int, k: int, expanded: int) -> Tensor:
    tokens, heads, width = pre_BHP.shape
    d_extension = width - d_base
    cells = d_base * d_extension
    best_BH = pre_BHP.new_empty(tokens, heads)
    sizes = _blocks("head_bounds", pre_BHP, width)
    _launch(
        _head_bounds_kernel, (tokens, triton.cdiv(heads, sizes.rows)),
        pre_BHP, best_BH, heads, d_base=d_base, d_extension=d_extension, block_h=sizes.rows, block_w=sizes.block,
        acc_type=_accumulator(pre_BHP.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    heads_BE = best_BH.topk(expanded, dim=1, sorted=False).indices
    products_BN = pre_BHP.new_empty(tokens, expanded * cells)
    sizes = _blocks("expand", pre_BHP, expanded * cells)
    _launch(
        _expand_kernel, (tokens, triton.cdiv(expanded * cells, sizes.block)),
        pre_BHP, heads_BE, products_BN, heads, expanded, d_base=d_base, d_extension=d_extension, block=sizes.block,
        acc_type=_accumulator(pre_BHP.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
    flat_BK = products_BN.topk(k, dim=1, sorted=False).indices
    latents_BK: Tensor = heads_BE.gather(1, flat_BK // cells) * cells + flat_BK % cells
    return latents_BK


def kronecker_linear_topk(
    x_BD: Float[Tensor, "B D"],
    weight_HPD: Float[Tensor, "H P D"],
    bias_HP: Float[Tensor, "H P"],
    d_base: int,
    choices: Sequence[Choice],
    null: bool = False,
) -> list[ChosenPairs]:
    """Make several selections from the heads of ``x W^T + b``; cuBLAS computes the product chunk by chunk.

    Heads with null symbols (``null``) are selected by `portable`, as are listed latents.
    """
    return portable.choose_in_chunks(x_BD, weight_HPD, bias_HP, d_base, choices, null, kronecker_topk)


@triton.jit
def _adamw_kernel(
    weight, moment, second, offsets, tokens, weights, x, width, scalars,
    unit_norm: tl.constexpr, only_touched: tl.constexpr, whole: tl.constexpr,
    block: tl.constexpr, acc_type: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + row)
    count = (tl.load(offsets + row + 1) - first).to(tl.int32)
    scale, decay, rest1 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    beta2, rest2 = tl.load(scalars + 3), tl.load(scalars + 4)
    step_size, root_scale, eps = tl.load(scalars + 5), tl.load(scalars + 6), tl.load(scalars + 7)
    limit = width
    if only_touched:
        limit = tl.where(count > 0, width, 0)
    squares = tl.zeros((block,), acc_type)
    for start in range(0, limit, block):
        d = start + tl.arange(0, block)
        inside = d < width
        at = row * width + d
        grad = _row_sum(tokens, weights, x, first, count, d, width, block, acc_type) * scale
        m = tl.load(moment + at, mask=inside, other=0).to(acc_type)
        m += rest1 * (grad - m)
        tl.store(moment + at, m.to(moment.dtype.element_ty), mask=inside)
        v = tl.load(second + at, mask=inside, other=0).to(acc_type)
        v = beta2 * v + rest2 * grad * grad
        tl.store(second + at, v.to(second.dtype.element_ty), mask=inside)
        w = tl.load(weight + at, mask=inside, other=0).to(acc_type)
        w = w * decay - step_size * (m / (tl.sqrt(v) * root_scale + eps))
        if unit_norm and whole:
            squared = tl.sum(w * w, axis=0)
            w = tl.where(squared > 0, w / tl.sqrt(tl.where(squared > 0, squared, 1)), w)
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
        if unit_norm and not whole:
            squares += w * w
    if unit_norm and not whole:  # a second pass over the row, which is still in cache
        squared = tl.sum(squares, axis=0)
        norm = tl.sqrt(tl.where(squared > 0, squared, 1))
        tl.debug_barrier()
        for start in range(0, limit, block):
            d = start + tl.arange(0, block)
            w = tl.load(weight + row * width + d, mask=d < width, other=0).to(acc_type) / norm
            tl.store(weight + row * width + d, w.to(weight.dtype.element_ty), mask=d < width)


def adamw(
    weight_PD: Float[Tensor, "P D"],
    moment_PD: Float[Tensor, "P D"],
    second_PD: Float[Tensor, "P D"],
    gradient: RowGradient | Float[Tensor, "P D"],
    settings: AdamW,
) -> None:
    """Take one step of `AdamW` in place; a dense gradient is passed to `portable`."""
    if not isinstance(gradient, RowGradient):
        portable.adamw(weight_PD, moment_PD, second_PD, gradient, settings)
        return
    height, width = weight_PD.shape
    scalars = torch.tensor(
        [
            settings.grad_scale, settings.decay, 1 - settings.beta1, settings.beta2, 1 - settings.beta2,
            settings.step_size, settings.root_scale, settings.eps,
        ],
        dtype=torch.float64 if weight_PD.dtype == torch.float64 else torch.float32,
        device=weight_PD.device,
    )  # fmt: skip
    sizes = _blocks("adamw", weight_PD, width)
    _launch(
        _adamw_kernel, (height,),
        weight_PD, moment_PD, second_PD, gradient.offsets, gradient.tokens_N, gradient.weights_N,
        gradient.x_BD.contiguous(), width, scalars,
        unit_norm=settings.unit_norm, only_touched=settings.only_touched, whole=sizes.block >= width,
        block=sizes.block, acc_type=_accumulator(weight_PD.dtype), num_warps=sizes.num_warps,
    )  # fmt: skip
