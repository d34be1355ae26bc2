"""CPU path: compiled numba loops over tokens or weight rows, split over PyTorch's number of threads.

Every function means the same as its namesake in `portable`. Ties go to the smaller latent, so a selection is unique. A
pre-latent that is NaN ranks with the zeros, which only fill up.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.kernels import _compiled_dense, _compiled_pursuit, _compiled_rows, _compiled_selection, portable
from kronsae.kernels.portable import PRODUCT_ELEMENTS, inverse_norms, join_inputs, pad_selection
from kronsae.kernels.rows import AdamW, RowGradient, Term
from kronsae.kernels.selection import (
    BatchSelection,
    Choice,
    ChosenPairs,
    Composition,
    KroneckerSelection,
    Pursued,
    PursuitRounds,
    cells_per_head,
)
from kronsae.kernels.threads import run_parts, split_by_work, split_evenly
from kronsae.support.tensors import ALIGNMENT_BYTES

Array = np.ndarray[Any, Any]
BLOCK_BYTES = 2**18
"""Pre-latents that are selected from at a time, 256 KB: less than a second-level cache has."""

_workspaces = threading.local()


def _to_numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


def _to_scalars(dtype: torch.dtype, *values: float) -> list[Any]:
    number = np.float64 if dtype == torch.float64 else np.float32
    return [number(value) for value in values]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate uninitialised memory with NumPy, which asks Linux for huge pages: 100 MB then cost half the time.

    NumPy aligns to 16 bytes only; the tensor starts at a multiple of 64 bytes, like PyTorch's own memory.
    """
    number = torch.empty(0, dtype=dtype).numpy().dtype
    raw = np.empty(math.prod(shape) + ALIGNMENT_BYTES // number.itemsize, number)
    start = -raw.ctypes.data % ALIGNMENT_BYTES // number.itemsize
    return torch.from_numpy(raw[start : start + math.prod(shape)].reshape(shape))


def _workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return this thread's buffer, overwritten by the next call: new memory costs a page fault per 4 KB."""
    kept: Tensor | None = getattr(_workspaces, str(dtype), None)
    if kept is None or kept.numel() < rows * columns:
        kept = _allocate((rows * columns,), dtype)
        setattr(_workspaces, str(dtype), kept)
    return kept[: rows * columns].view(rows, columns)


def _chunks(tokens: int, outputs: int) -> list[slice]:
    """Split tokens evenly into at least one chunk: at most `PRODUCT_ELEMENTS` outputs each, but at least 64 tokens."""
    chunks = max(1, -(-tokens // max(64, PRODUCT_ELEMENTS // outputs)))
    chunk = max(1, -(-tokens // chunks))
    return [slice(start, min(start + chunk, tokens)) for start in range(0, max(1, tokens), chunk)]


def _products(x_BD: Tensor, weight_PD: Tensor) -> Iterator[tuple[slice, Array]]:
    """Yield ``x W^T`` in chunks of tokens with their slice, in one reused buffer."""
    for part in _chunks(len(x_BD), len(weight_PD)):
        pre_BP = _workspace(part.stop - part.start, len(weight_PD), x_BD.dtype)
        torch.mm(x_BD[part], weight_PD.T, out=pre_BP)
        yield part, pre_BP.numpy()


def product_chunks(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"]
) -> Iterator[tuple[int, Float[Tensor, "C P"]]]:
    """Yield ``x W^T + b`` in chunks with the index of the first token, in one buffer that each chunk overwrites."""
    for part in _chunks(len(x_BD), len(weight_PD)):
        pre_BP = _workspace(part.stop - part.start, len(weight_PD), x_BD.dtype)
        yield part.start, torch.addmm(bias_P, x_BD[part], weight_PD.T, out=pre_BP)


def kronecker_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int) -> KroneckerSelection:
    """Select the k largest products of each token."""
    return _choose_from(pre_BHP, d_base, Choice(k)).selection


def kronecker_topk_among(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, k: int, latents_C: Int[Tensor, " C"]
) -> KroneckerSelection:
    """Select the k largest products among the listed latents."""
    return _choose_from(pre_BHP, d_base, Choice(k, latents_C)).selection


def _choose_from(pre_BHP: Tensor, d_base: int, choice: Choice) -> ChosenPairs:
    tokens, heads, width = pre_BHP.shape
    chosen = _allocate_choice(tokens, choice.k, pre_BHP.dtype)
    bias_P = np.zeros(heads * width, _to_numpy(pre_BHP[:0]).dtype)
    _select(_to_numpy(pre_BHP).reshape(tokens, heads * width), bias_P, heads, d_base, False, [(choice, chosen)])
    return chosen


def _allocate_choice(tokens: int, k: int, dtype: torch.dtype) -> ChosenPairs:
    rows_BR = torch.empty(tokens, 2 * k, dtype=torch.int64)
    selection = KroneckerSelection(torch.empty(tokens, k, dtype=torch.int64), rows_BR[:, :k], rows_BR[:, k:])
    return ChosenPairs(selection, rows_BR, torch.empty(tokens, 2 * k, dtype=dtype))


def _head_bounds(pre_BP: Array, bias_P: Array, heads: int, d_base: int) -> Array:
    best_BH: Array = np.empty((len(pre_BP), heads), pre_BP.dtype)
    kernel = _compiled_selection.head_maxima(d_base, len(bias_P) // heads - d_base, True)
    run_parts(kernel, split_evenly(len(pre_BP)), pre_BP, bias_P, best_BH, best_BH)
    return best_BH


def head_maxima(pre_BHP: Float[Tensor, "B H P"], d_base: int) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]:
    """Return the largest base and the largest extension of each head, 0 if none is positive."""
    tokens, heads, width = pre_BHP.shape
    base_BH, extension_BH = (torch.empty(tokens, heads, dtype=pre_BHP.dtype) for _ in range(2))
    pre_BP = _to_numpy(pre_BHP).reshape(tokens, heads * width)
    kernel = _compiled_selection.head_maxima(d_base, width - d_base, False)
    bias_P = np.zeros(heads * width, pre_BP.dtype)
    run_parts(kernel, split_evenly(tokens), pre_BP, bias_P, base_BH.numpy(), extension_BH.numpy())
    return base_BH, extension_BH


def _select(
    pre_BP: Array,
    bias_P: Array,
    heads: int,
    d_base: int,
    null: bool,
    choices: Sequence[tuple[Choice, ChosenPairs]],
) -> None:
    """Make selections from pre-latents, a block of tokens at a time.

    A selection reads few pre-latents of a token, all over its row. They are read from the second-level cache, where
    the head maxima of the block, which read all of them, have just left them.
    """
    d_extension = len(bias_P) // heads - d_base
    best_BH: Array = np.empty((len(pre_BP), heads), pre_BP.dtype)
    bounds = _compiled_selection.head_maxima(d_base, d_extension, True, null)
    shared = (pre_BP, bias_P, best_BH, d_base, d_extension, int(null))
    steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = [(bounds, (pre_BP, bias_P, best_BH, best_BH))]
    for choice, chosen in choices:
        outputs = tuple(map(_to_numpy, (chosen.selection.indices_BK, chosen.rows_BR, chosen.pre_BR)))
        if choice.latents_C is None:
            steps.append((_compiled_selection.kronecker_topk, (*shared, *outputs)))
        else:
            latents_C = np.sort(_to_numpy(choice.latents_C))
            ends_H = np.searchsorted(latents_C, (1 + np.arange(heads)) * cells_per_head(d_base, d_extension, null))
            steps.append((_compiled_selection.kronecker_topk_among, (*shared, latents_C, ends_H, *outputs)))
    block = max(1, BLOCK_BYTES // (len(bias_P) * pre_BP.itemsize))

    def select(start: int, stop: int) -> None:
        for first in range(start, stop, block):
            for kernel, arguments in steps:
                kernel(first, min(first + block, stop), *arguments)

    run_parts(select, split_evenly(len(pre_BP)))


def kronecker_linear_topk(
    x_BD: Float[Tensor, "B D"],
    weight_HPD: Float[Tensor, "H P D"],
    bias_HP: Float[Tensor, "H P"],
    d_base: int,
    choices: Sequence[Choice],
    null: bool = False,
) -> list[ChosenPairs]:
    """Make several selections from the heads of ``x W^T + b``; the products are in one reused buffer."""
    heads, tokens = len(weight_HPD), len(x_BD)
    weight_PD, bias_P = weight_HPD.flatten(0, 1), _to_numpy(bias_HP.flatten())
    results = [_allocate_choice(tokens, choice.k, x_BD.dtype) for choice in choices]
    for part, pre_BP in _products(x_BD, weight_PD):
        parts = [
            ChosenPairs(KroneckerSelection(*(tensor[part] for tensor in selection)), rows_BR[part], pre_BR[part])
            for selection, rows_BR, pre_BR in results
        ]
        _select(pre_BP, bias_P, heads, d_base, null, list(zip(choices, parts, strict=True)))
    return results


def kronecker_batch_topk(pre_BHP: Float[Tensor, "B H P"], d_base: int, total: int) -> BatchSelection:
    """Select the ``total`` largest positive products of the batch; ties go to the earlier token, then the latent."""
    tokens, heads, width = pre_BHP.shape
    d_extension = width - d_base
    pre_BP = _to_numpy(pre_BHP).reshape(tokens, heads * width)
    best_BH = _head_bounds(pre_BP, np.zeros(heads * width, pre_BP.dtype), heads, d_base)
    smallest = np.nextafter(pre_BP.dtype.type(0), pre_BP.dtype.type(1))  # a product of 0 is not active
    least_F = np.full(heads * d_base * d_extension, max(smallest, _kth_largest(best_BH.ravel(), total)))
    tokens_N, latents_N, u_N, v_N = _find_products_from(pre_BHP, d_base, least_F, best_BH)
    if len(latents_N) > total:
        kept_N = _mark_largest(u_N * v_N, total)
        tokens_N, latents_N = tokens_N[kept_N], latents_N[kept_N]
    return pad_selection(torch.from_numpy(tokens_N), torch.from_numpy(latents_N), tokens, d_base, d_extension)


def kronecker_above(
    pre_BHP: Float[Tensor, "B H P"], d_base: int, thresholds_F: Float[Tensor, " F"], composition: Composition
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Return token and latent of every positive composition above its latent's threshold, by token, then latent.

    The products that can exceed their threshold are listed first; only for these the compositions are computed.
    """
    thresholds_F = thresholds_F.clamp_min(0).to(pre_BHP.dtype)
    nothing = composition.function(*thresholds_F.new_zeros(2, 1))
    pairs_only = composition.alone is None
    if composition.least_product is None or not pairs_only or bool(nothing > thresholds_F.min()):
        return portable.kronecker_above(pre_BHP, d_base, thresholds_F, composition)
    least_F = _to_numpy(composition.least_product(thresholds_F).clamp_min(0))
    tokens_N, latents_N, u_N, v_N = map(torch.from_numpy, _find_products_from(pre_BHP, d_base, least_F))
    on_N = composition.function(u_N, v_N) > thresholds_F[latents_N]
    return tokens_N[on_N], latents_N[on_N]


def _find_products_from(
    pre_BHP: Tensor, d_base: int, least_F: Array, best_BH: Array | None = None
) -> tuple[Array, ...]:
    """Return tokens, latents and parents of all positive pairs whose product is at least their latent's ``least``."""
    tokens, heads, width = pre_BHP.shape
    pre_BP = _to_numpy(pre_BHP).reshape(tokens, heads * width)
    bias_P = np.zeros(heads * width, pre_BP.dtype)
    if best_BH is None:
        best_BH = _head_bounds(pre_BP, bias_P, heads, d_base)
    least_H = least_F.reshape(heads, -1).min(1)
    kernel = _compiled_selection.products_from
    return _run_lists(kernel, 0, tokens, pre_BP, bias_P, d_base, width - d_base, best_BH, least_H, least_F)


def pairs_at(
    pre_BP: Float[Tensor, "B P"], indices_BK: Int[Tensor, "B K"], d_base: int, d_extension: int, null: bool = False
) -> ChosenPairs:
    """Return the latents with their parents' rows and values; ``null``: with null symbols."""
    chosen = _allocate_choice(len(indices_BK), indices_BK.shape[1], pre_BP.dtype)
    outputs = (_to_numpy(chosen.selection.indices_BK), _to_numpy(chosen.rows_BR), _to_numpy(chosen.pre_BR))
    bias_P = np.zeros(pre_BP.shape[1], _to_numpy(pre_BP[:0]).dtype)
    kernel = _compiled_selection.pairs_at
    run_parts(
        kernel,
        split_evenly(len(pre_BP)),
        _to_numpy(pre_BP),
        bias_P,
        d_base,
        d_extension,
        int(null),
        _to_numpy(indices_BK),
        *outputs,
    )
    return chosen


def _kth_largest(values: Array, k: int) -> Any:
    return values.dtype.type(0) if len(values) < k else np.partition(values, len(values) - k)[len(values) - k]


def _mark_largest(values: Array, k: int) -> Array:
    """Mark the k largest values; ties go to the first ones."""
    threshold = _kth_largest(values, k)
    kept: Array = values > threshold
    level = np.flatnonzero(values == threshold)
    kept[level[: k - int(kept.sum())]] = True
    return kept


def linear_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], k: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the k largest of ``relu(x W^T + b)`` per token, as outputs before ReLU, and their rows."""
    values_BK = torch.empty(len(x_BD), k, dtype=x_BD.dtype)
    rows_BK = torch.empty(len(x_BD), k, dtype=torch.int64)
    bias = _to_numpy(bias_P)
    for part, pre_BP in _products(x_BD, weight_PD):
        outputs = (_to_numpy(values_BK[part]), _to_numpy(rows_BK[part]))
        run_parts(_compiled_dense.topk, split_evenly(len(pre_BP)), pre_BP, bias, *outputs)
    return values_BK, rows_BK


def linear_above(
    x_BD: Float[Tensor, "B D"],
    weight_PD: Float[Tensor, "P D"],
    bias_P: Float[Tensor, " P"],
    thresholds_P: Float[Tensor, " P"],
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return every positive output above its threshold, rows ascending."""
    bias, thresholds = _to_numpy(bias_P), _to_numpy(thresholds_P.clamp_min(0).to(x_BD.dtype))
    found = [_find_above(part, pre_BP, bias, thresholds) for part, pre_BP in _products(x_BD, weight_PD)]
    return _pad_outputs(_concatenate(found, x_BD.dtype), len(x_BD))


def linear_batch_topk(
    x_BD: Float[Tensor, "B D"], weight_PD: Float[Tensor, "P D"], bias_P: Float[Tensor, " P"], total: int
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """Return the ``total`` largest positive outputs of the batch, rows ascending; ties go to the earlier token, row.

    In each chunk it lists the outputs that reach ``least``: the larger of the ``total``-th largest lane maximum and the
    smallest of the ``total`` best outputs so far.
    """
    bias = _to_numpy(bias_P)
    best = _concatenate([], x_BD.dtype)
    least = bias.dtype.type(0)
    for part, pre_BP in _products(x_BD, weight_PD):
        lanes_BL = np.empty((len(pre_BP), min(_compiled_dense.LANES, len(bias))), bias.dtype)
        run_parts(_compiled_dense.lane_maxima, split_evenly(len(pre_BP)), pre_BP, bias, lanes_BL)
        least = max(least, _kth_largest(lanes_BL.ravel(), total))
        just_below = np.full(len(bias), np.nextafter(least, bias.dtype.type(0)))
        best = _concatenate([best, _find_above(part, pre_BP, bias, just_below)], x_BD.dtype)
        if len(best.values_N) > total:
            kept_N = _mark_largest(best.values_N, total)
            best = _Outputs(*(array[kept_N] for array in best))
            least = best.values_N.min()
    return _pad_outputs(best, len(x_BD))


class _Outputs(NamedTuple):
    """Outputs selected from a batch: tokens ascending, and rows ascending within a token."""

    tokens_N: Array
    rows_N: Array
    values_N: Array


def _run_lists(
    kernel: Callable[..., tuple[Array, ...]], first_token: int, tokens: int, *arguments: Any
) -> tuple[Array, ...]:
    """Run ``kernel`` on parts of the tokens; return the token of each listed item and the concatenated lists."""
    counts_B = np.empty(tokens, np.int64)
    parts: dict[int, tuple[Array, ...]] = {}

    def work(start: int, stop: int) -> None:
        parts[start] = kernel(start, stop, *arguments, counts_B)

    run_parts(work, split_evenly(tokens))
    if not parts:  # no tokens
        work(0, 0)
    tokens_N = np.repeat(np.arange(first_token, first_token + tokens), counts_B)
    return tokens_N, *map(np.concatenate, zip(*(parts[start] for start in sorted(parts)), strict=True))


def _find_above(part: slice, pre_BP: Array, bias_P: Array, thresholds_P: Array) -> _Outputs:
    return _Outputs(*_run_lists(_compiled_dense.above, part.start, len(pre_BP), pre_BP, bias_P, thresholds_P))


def _concatenate(found: Sequence[_Outputs], dtype: torch.dtype) -> _Outputs:
    none = _Outputs(np.empty(0, np.int64), np.empty(0, np.int64), _to_numpy(torch.empty(0, dtype=dtype)))
    return _Outputs(*map(np.concatenate, zip(none, *found, strict=True)))


def _pad_outputs(found: _Outputs, tokens: int) -> tuple[Tensor, Tensor]:
    """Return values and rows, one line per token, filled up with row 0 and value 0."""
    counts_B = np.bincount(found.tokens_N, minlength=tokens)
    width = max(1, int(counts_B.max(initial=0)))
    rows_BK = torch.empty(tokens, width, dtype=torch.int64)
    values_BK = torch.from_numpy(np.empty((tokens, width), found.values_N.dtype))
    outputs = (values_BK.numpy(), rows_BK.numpy())
    run_parts(
        _compiled_dense.lay_out, split_evenly(tokens), np.cumsum(counts_B), found.values_N, found.rows_N, *outputs
    )
    return values_BK, rows_BK


def weighted_rows(
    weights_BR: Float[Tensor, "B R"],
    rows_BR: Int[Tensor, "B R"],
    matrix_PD: Float[Tensor, "P D"],
    bias_D: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B D"]:
    """Return ``out[b] = bias + sum_r weights[b, r] * matrix[rows[b, r]]``."""
    out_BD = torch.empty(len(rows_BR), matrix_PD.shape[1], dtype=matrix_PD.dtype)
    bias = matrix_PD.new_zeros(matrix_PD.shape[1]) if bias_D is None else bias_D
    inputs = map(_to_numpy, (weights_BR, rows_BR, matrix_PD, bias))
    run_parts(_compiled_rows.weighted_rows, split_evenly(len(out_BD)), *inputs, out_BD.numpy())
    return out_BD


def sampled_products(
    x_BD: Float[Tensor, "B D"], matrix_PD: Float[Tensor, "P D"], rows_BR: Int[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return ``out[b, r] = x[b] . matrix[rows[b, r]]``."""
    out_BR = torch.empty(rows_BR.shape, dtype=matrix_PD.dtype)
    inputs = map(_to_numpy, (x_BD, matrix_PD, rows_BR))
    run_parts(_compiled_rows.sampled_products, split_evenly(len(out_BR)), *inputs, out_BR.numpy())
    return out_BR


def pursue(
    target_BD: Float[Tensor, "B D"],
    matrix_FD: Float[Tensor, "F D"],
    values_BC: Float[Tensor, "B C"],
    latents_BC: Int[Tensor, "B C"],
    rounds: PursuitRounds,
) -> Pursued:
    """A pursuit among the candidates of each token, one token at a time: its residual never leaves the cache."""
    shape = (len(target_BD), sum(rounds.sizes))
    found = Pursued(torch.empty(shape, dtype=values_BC.dtype), *(torch.empty(shape, dtype=torch.int64) for _ in "12"))
    inputs = map(_to_numpy, (target_BD, matrix_FD, inverse_norms(matrix_FD.detach()), values_BC, latents_BC))
    if len(rounds.sizes) != len(rounds.steps):
        raise ValueError(f"rounds.steps must have one entry per round; got {rounds}.")
    scalars = _to_scalars(values_BC.dtype, rounds.start, torch.finfo(values_BC.dtype).tiny)
    settings = (np.array(rounds.sizes), np.array(rounds.steps), *scalars)
    run_parts(_compiled_pursuit.pursue, split_evenly(len(target_BD)), *inputs, *settings, *map(_to_numpy, found))
    return found


def group_rows(terms: Sequence[Term], height: int) -> RowGradient:
    """Sort the entries of all terms by row, stably, with a counting sort."""
    offsets = np.zeros(height + 2, np.int64)
    arrays = [(_to_numpy(term.rows_BR), _to_numpy(term.weights_BR)) for term in terms]
    for rows_BR, weights_BR in arrays:
        _compiled_rows.count_entries(rows_BR, weights_BR, offsets)
    _compiled_rows.running_sum(offsets)
    tokens_N = np.empty(int(offsets[-1]), np.int64)
    weights_N = np.empty(len(tokens_N), arrays[0][1].dtype)
    first_token = 0
    for rows_BR, weights_BR in arrays:
        _compiled_rows.place_entries(rows_BR, weights_BR, first_token, offsets, tokens_N, weights_N)
        first_token += len(rows_BR)
    return RowGradient(
        torch.from_numpy(offsets[:-1]),
        torch.from_numpy(tokens_N),
        torch.from_numpy(weights_N),
        join_inputs(terms).contiguous(),
    )


def _grouped(gradient: RowGradient) -> list[Array]:
    return [_to_numpy(part) for part in (gradient.offsets, gradient.tokens_N, gradient.weights_N, gradient.x_BD)]


def gradient_rows(gradient: RowGradient) -> Float[Tensor, "P D"]:
    """Return the gradient as a tensor; every row is written."""
    out_PD = _allocate((gradient.height, gradient.x_BD.shape[1]), gradient.x_BD.dtype)
    grouped = _grouped(gradient)
    run_parts(_compiled_rows.scatter_rows, split_by_work(grouped[0], per_row=1), *grouped, out_PD.numpy())
    return out_PD


def squared_norm(gradient: RowGradient) -> Float[Tensor, ""]:
    """Return ``|G|^2`` in float64 without storing G."""
    grouped = _grouped(gradient)
    squares_P = np.empty(gradient.height, grouped[3].dtype)
    run_parts(_compiled_rows.squared_norms, split_by_work(grouped[0], per_row=0), *grouped, squares_P)
    return torch.tensor(squares_P.sum(dtype=np.float64))


def adamw(
    weight_PD: Float[Tensor, "P D"],
    moment_PD: Float[Tensor, "P D"],
    second_PD: Float[Tensor, "P D"],
    gradient: RowGradient | Float[Tensor, "P D"],
    settings: AdamW,
) -> None:
    """Take one step of `AdamW` in place: gradient row, moments, weight and norm in one pass over memory."""
    weights = [tensor.detach().numpy() for tensor in (weight_PD, moment_PD, second_PD)]
    scalars = _to_scalars(
        weight_PD.dtype,
        settings.grad_scale,
        settings.decay,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.step_size,
        settings.root_scale,
        settings.eps,
    )
    if isinstance(gradient, RowGradient):
        grouped = _grouped(gradient)
        borders = split_by_work(grouped[0], per_row=0 if settings.only_touched else 6)
        flags = (settings.unit_norm, settings.only_touched)
        run_parts(_compiled_rows.adamw_entries, borders, *weights, *grouped, *scalars, *flags)
    else:
        borders = split_evenly(len(weight_PD))
        run_parts(_compiled_rows.adamw_dense, borders, *weights, _to_numpy(gradient), *scalars, settings.unit_norm)
