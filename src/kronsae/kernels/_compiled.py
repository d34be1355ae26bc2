# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# Types are numba's to infer: one source for float32 and float64, compiled at first use.
"""The loops of the CPU path, compiled by numba; `cpu` is their only caller.

Each kernel works on the items ``start <= i < stop`` of its first axis (tokens or weight rows) and writes only what
belongs to them, so the parts may run on different threads in any order and give the same bits. They hold no GIL and
use no threading layer of numba's: its OpenMP layer is a second pool beside PyTorch's, and the two may take turns
waiting for each other (`benchmarks/tried.py` measures it).

A NaN is in no comparison larger, so the selections rank it with the zeros: every row number they write is valid.

Loops that add up in a fixed order carry no ``reassoc``; dot products and squared norms do, in an order fixed by the
compiled code. Compiled code is cached beside the module (as Python does with .pyc files), or in numba's user cache
where that folder cannot be written, or in ``NUMBA_CACHE_DIR``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit

_PLAIN: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
_SUMS: dict[str, Any] = _PLAIN | {"fastmath": {"contract", "reassoc", "nsz"}}
_MAXIMA: dict[str, Any] = _PLAIN | {"fastmath": {"contract", "nsz"}}


@njit(**_PLAIN)
def _worse(value_a, index_a, value_b, index_b):
    """Whether a ranks below b: by value, and among equal values the larger index ranks below."""
    return value_a < value_b or (value_a == value_b and index_a > index_b)


@njit(**_PLAIN)
def _sift(values, indices, hole, size):
    """Restore the heap (worst first) below ``hole``."""
    value, index = values[hole], indices[hole]
    child = 2 * hole + 1
    while child < size:
        if child + 1 < size and _worse(values[child + 1], indices[child + 1], values[child], indices[child]):
            child += 1
        if not _worse(values[child], indices[child], value, index):
            break
        values[hole], indices[hole] = values[child], indices[child]
        hole = child
        child = 2 * hole + 1
    values[hole], indices[hole] = value, index


@njit(**_PLAIN)
def _offer(values, indices, size, value, index):
    """Keep the best ``len(values)`` of the candidates offered; return how many are kept."""
    if size < len(values):
        values[size], indices[size] = value, index
        size += 1
        if size == len(values):
            for hole in range(size // 2 - 1, -1, -1):
                _sift(values, indices, hole, size)
    elif _worse(values[0], indices[0], value, index):
        values[0], indices[0] = value, index
        _sift(values, indices, 0, size)
    return size


@njit(**_PLAIN)
def _sift_bound(bounds, value):
    """Replace the smallest of a heap of plain numbers by ``value``."""
    size = len(bounds)
    hole = 0
    child = 1
    while child < size:
        if child + 1 < size and bounds[child + 1] < bounds[child]:
            child += 1
        if bounds[child] >= value:
            break
        bounds[hole] = bounds[child]
        hole = child
        child = 2 * hole + 1
    bounds[hole] = value


@njit(**_PLAIN)
def _kth_bound(best, bounds):
    """The ``len(bounds)``-th largest of ``best``, or 0 where fewer are positive."""
    bounds[:] = 0
    for value in best:
        if value > bounds[0]:
            _sift_bound(bounds, value)
    return bounds[0]


@functools.cache
def head_bounds(d_base, d_extension):
    """Compile ``best[b, h] = max(0, max_i u_i) * max(0, max_j v_j)`` for one head shape.

    With the two sizes known the loops over them unroll (`benchmarks/tried.py` measures what that saves).
    """
    width = d_base + d_extension

    @njit(**_MAXIMA)
    def bounds(start, stop, pre_BP, bias_P, best_BH):
        zero = pre_BP.dtype.type(0)
        for b in range(start, stop):
            for head in range(best_BH.shape[1]):
                row = head * width
                largest_base = zero
                for i in range(d_base):
                    value = pre_BP[b, row + i] + bias_P[row + i]
                    if value > largest_base:
                        largest_base = value
                largest_extension = zero
                for j in range(d_base, width):
                    value = pre_BP[b, row + j] + bias_P[row + j]
                    if value > largest_extension:
                        largest_extension = value
                best = largest_base * largest_extension
                best_BH[b, head] = best if best > 0 else zero  # inf * 0 is NaN

    return bounds


@njit(**_PLAIN)
def _offer_head(pre_P, bias_P, head, d_base, d_extension, least, values, indices, size):
    """Offer every positive product of one head that is at least ``least``."""
    row = head * (d_base + d_extension)
    first_extension = row + d_base
    for i in range(d_base):
        base = pre_P[row + i] + bias_P[row + i]
        if base <= 0:
            continue
        for j in range(d_extension):
            product = base * (pre_P[first_extension + j] + bias_P[first_extension + j])
            if product > 0 and product >= least:
                size = _offer(values, indices, size, product, (head * d_base + i) * d_extension + j)
                if size == len(values) and values[0] > least:
                    least = values[0]
    return size


@njit(**_PLAIN)
def _product(pre_P, bias_P, latent, d_base, d_extension):
    head = latent // (d_base * d_extension)
    cell = latent - head * d_base * d_extension
    row = head * (d_base + d_extension)
    base = row + cell // d_extension
    extension = row + d_base + cell % d_extension
    zero = pre_P.dtype.type(0)
    return max(zero, pre_P[base] + bias_P[base]) * max(zero, pre_P[extension] + bias_P[extension])


@njit(**_PLAIN)
def _write(pre_P, bias_P, indices, d_base, d_extension, out_index, out_row, out_pre):
    """Write the chosen latents, their parents' rows (bases, then extensions) and their parents' values."""
    k = len(indices)
    cells = d_base * d_extension
    for n in range(k):
        latent = indices[n]
        head = latent // cells
        cell = latent - head * cells
        row = head * (d_base + d_extension)
        i = cell // d_extension
        base = row + i
        extension = row + d_base + cell - i * d_extension
        out_index[n] = latent
        out_row[n] = base
        out_row[k + n] = extension
        out_pre[n] = pre_P[base] + bias_P[base]
        out_pre[k + n] = pre_P[extension] + bias_P[extension]


@njit(**_PLAIN)
def kronecker_topk(
    start, stop, pre_BP, bias_P, best_BH, d_base, d_extension, out_index_BK, out_row_BR, out_pre_BR
):  # fmt: skip
    """The k largest products of each token, ordered by (value, then smaller index); zeros fill up by index."""
    k = out_index_BK.shape[1]
    values = np.empty(k, pre_BP.dtype)
    indices = np.empty(k, np.int64)
    bounds = np.empty(k, pre_BP.dtype)
    for b in range(start, stop):
        pre_P, best_H = pre_BP[b], best_BH[b]
        least = _kth_bound(best_H, bounds)
        size = 0
        for head in range(len(best_H)):
            if best_H[head] >= least and best_H[head] > 0:
                size = _offer_head(pre_P, bias_P, head, d_base, d_extension, least, values, indices, size)
                if size == k and values[0] > least:
                    least = values[0]
        latent = 0
        while size < k:
            if not _product(pre_P, bias_P, latent, d_base, d_extension) > 0:
                indices[size] = latent
                size += 1
            latent += 1
        _write(pre_P, bias_P, indices, d_base, d_extension, out_index_BK[b], out_row_BR[b], out_pre_BR[b])


@njit(**_PLAIN)
def kronecker_topk_among(
    start, stop, pre_BP, bias_P, best_BH, d_base, d_extension, latents_C, ends_H,
    out_index_BK, out_row_BR, out_pre_BR,
):  # fmt: skip
    """As `kronecker_topk` over the sorted ``latents`` only; those of head h end at ``ends[h]``.

    The head's bound is now only an upper one, so heads are streamed against the running k-th value.
    """
    k = out_index_BK.shape[1]
    values = np.empty(k, pre_BP.dtype)
    indices = np.empty(k, np.int64)
    for b in range(start, stop):
        pre_P, best_H = pre_BP[b], best_BH[b]
        size = 0
        first = 0
        for head in range(len(best_H)):
            last = ends_H[head]
            if last > first and best_H[head] > 0 and (size < k or best_H[head] > values[0]):
                for c in range(first, last):
                    product = _product(pre_P, bias_P, latents_C[c], d_base, d_extension)
                    if product > 0:
                        size = _offer(values, indices, size, product, latents_C[c])
            first = last
        c = 0
        while size < k:
            if not _product(pre_P, bias_P, latents_C[c], d_base, d_extension) > 0:
                indices[size] = latents_C[c]
                size += 1
            c += 1
        _write(pre_P, bias_P, indices, d_base, d_extension, out_index_BK[b], out_row_BR[b], out_pre_BR[b])


@njit(**_PLAIN)
def count_products(start, stop, pre_BP, bias_P, d_base, d_extension, best_BH, least, counts_B):
    """How many positive products of each token are at least ``least``."""
    for b in range(start, stop):
        count = 0
        for head in range(best_BH.shape[1]):
            if best_BH[b, head] > 0 and best_BH[b, head] >= least:
                for latent in range(head * d_base * d_extension, (head + 1) * d_base * d_extension):
                    product = _product(pre_BP[b], bias_P, latent, d_base, d_extension)
                    if product > 0 and product >= least:
                        count += 1
        counts_B[b] = count


@njit(**_PLAIN)
def list_products(
    start, stop, pre_BP, bias_P, d_base, d_extension, best_BH, least, starts_B, products_N, latents_N
):  # fmt: skip
    """Write what `count_products` counted, token after token, latents ascending."""
    for b in range(start, stop):
        at = starts_B[b]
        for head in range(best_BH.shape[1]):
            if best_BH[b, head] > 0 and best_BH[b, head] >= least:
                for latent in range(head * d_base * d_extension, (head + 1) * d_base * d_extension):
                    product = _product(pre_BP[b], bias_P, latent, d_base, d_extension)
                    if product > 0 and product >= least:
                        products_N[at] = product
                        latents_N[at] = latent
                        at += 1


_LANES = 1024


@njit(**_PLAIN)
def topk(start, stop, pre_BF, bias_F, out_value_BK, out_index_BK):
    """The k largest of ``relu(pre + bias)`` per token: `kronecker_topk` with lanes in the place of heads.

    A lane is the latents congruent modulo `_LANES`: the maxima of all lanes are one vectorised pass (134 MB in 8 ms;
    maxima of contiguous blocks took 20).
    """
    width = pre_BF.shape[1]
    k = out_index_BK.shape[1]
    values = np.empty(k, pre_BF.dtype)
    indices = np.empty(k, np.int64)
    best_L = np.empty(min(_LANES, width), pre_BF.dtype)
    bounds = np.empty(k, pre_BF.dtype)
    for b in range(start, stop):
        pre_F = pre_BF[b]
        best_L[:] = 0
        for first in range(0, width, _LANES):
            for lane in range(min(_LANES, width - first)):
                value = pre_F[first + lane] + bias_F[first + lane]
                best_L[lane] = value if value > best_L[lane] else best_L[lane]
        least = _kth_bound(best_L, bounds)
        size = 0
        for lane in range(len(best_L)):
            if best_L[lane] >= least and best_L[lane] > 0:
                for f in range(lane, width, _LANES):
                    value = pre_F[f] + bias_F[f]
                    if value > 0 and value >= least:
                        size = _offer(values, indices, size, value, f)
                        if size == k and values[0] > least:
                            least = values[0]
        f = 0
        while size < k:
            if not pre_F[f] + bias_F[f] > 0:
                indices[size] = f
                size += 1
            f += 1
        for n in range(k):
            out_index_BK[b, n] = indices[n]
            out_value_BK[b, n] = pre_F[indices[n]] + bias_F[indices[n]]


@njit(**_PLAIN)
def _add_rows(weights, rows, first, last, matrix, out_D):
    """``out += sum_n weights[n] * matrix[rows[n]]``, eight rows at a time.

    So ``out`` is loaded and stored once for eight, and eight rows stream from memory at once.
    """
    n = first
    while n + 7 < last:
        w0, w1, w2, w3 = weights[n], weights[n + 1], weights[n + 2], weights[n + 3]
        w4, w5, w6, w7 = weights[n + 4], weights[n + 5], weights[n + 6], weights[n + 7]
        r0, r1, r2, r3 = rows[n], rows[n + 1], rows[n + 2], rows[n + 3]
        r4, r5, r6, r7 = rows[n + 4], rows[n + 5], rows[n + 6], rows[n + 7]
        for d in range(len(out_D)):
            low = w0 * matrix[r0, d] + w1 * matrix[r1, d] + w2 * matrix[r2, d] + w3 * matrix[r3, d]
            high = w4 * matrix[r4, d] + w5 * matrix[r5, d] + w6 * matrix[r6, d] + w7 * matrix[r7, d]
            out_D[d] += low + high
        n += 8
    while n + 1 < last:
        w0, w1, r0, r1 = weights[n], weights[n + 1], rows[n], rows[n + 1]
        for d in range(len(out_D)):
            out_D[d] += w0 * matrix[r0, d] + w1 * matrix[r1, d]
        n += 2
    if n < last:
        w0, r0 = weights[n], rows[n]
        for d in range(len(out_D)):
            out_D[d] += w0 * matrix[r0, d]


@njit(**_PLAIN)
def weighted_rows(start, stop, weights_BR, rows_BR, matrix_PD, bias_D, out_BD):
    """``out[b] = bias + sum_r weights[b, r] * matrix[rows[b, r]]``."""
    for b in range(start, stop):
        out_D = out_BD[b]
        for d in range(len(out_D)):
            out_D[d] = bias_D[d]
        _add_rows(weights_BR[b], rows_BR[b], 0, rows_BR.shape[1], matrix_PD, out_D)


@njit(**_SUMS)
def _dot(a_D, b_D):
    total = a_D.dtype.type(0)
    for d in range(len(a_D)):
        total += a_D[d] * b_D[d]
    return total


@njit(**_SUMS)
def sampled_products(start, stop, x_BD, matrix_PD, rows_BR, out_BR):
    """``out[b, r] = x[b] . matrix[rows[b, r]]``, four rows at a time: four streams from memory instead of one."""
    entries = rows_BR.shape[1]
    zero = x_BD.dtype.type(0)
    for b in range(start, stop):
        x_D = x_BD[b]
        r = 0
        while r + 3 < entries:
            row0, row1, row2, row3 = rows_BR[b, r], rows_BR[b, r + 1], rows_BR[b, r + 2], rows_BR[b, r + 3]
            sum0, sum1, sum2, sum3 = zero, zero, zero, zero
            for d in range(len(x_D)):
                sum0 += x_D[d] * matrix_PD[row0, d]
                sum1 += x_D[d] * matrix_PD[row1, d]
                sum2 += x_D[d] * matrix_PD[row2, d]
                sum3 += x_D[d] * matrix_PD[row3, d]
            out_BR[b, r], out_BR[b, r + 1], out_BR[b, r + 2], out_BR[b, r + 3] = sum0, sum1, sum2, sum3
            r += 4
        while r < entries:
            out_BR[b, r] = _dot(x_D, matrix_PD[rows_BR[b, r]])
            r += 1


@njit(**_PLAIN)
def count_entries(rows_BR, weights_BR, offsets):
    """Add the number of entries of row p to ``offsets[p + 2]``; an entry of weight 0 is none."""
    for b in range(rows_BR.shape[0]):
        for r in range(rows_BR.shape[1]):
            if weights_BR[b, r] != 0:
                offsets[rows_BR[b, r] + 2] += 1


@njit(**_PLAIN)
def running_sum(offsets):
    """``offsets[p] = sum of offsets[:p + 1]`` in place."""
    for p in range(1, len(offsets)):
        offsets[p] += offsets[p - 1]


@njit(**_PLAIN)
def place_entries(rows_BR, weights_BR, first_token, offsets, tokens_N, weights_N):
    """Put each entry behind those of its row placed before it; afterwards row p spans offsets[p : p + 2]."""
    for b in range(rows_BR.shape[0]):
        for r in range(rows_BR.shape[1]):
            if weights_BR[b, r] != 0:
                at = offsets[rows_BR[b, r] + 1]
                tokens_N[at] = first_token + b
                weights_N[at] = weights_BR[b, r]
                offsets[rows_BR[b, r] + 1] = at + 1


@njit(**_PLAIN)
def scatter_rows(start, stop, offsets, tokens_N, weights_N, x_BD, out_PD):
    """``out[p] = sum of weights[n] * x[tokens[n]]`` over the entries of row p; every row is written."""
    for p in range(start, stop):
        out_D = out_PD[p]
        for d in range(len(out_D)):
            out_D[d] = 0
        _add_rows(weights_N, tokens_N, offsets[p], offsets[p + 1], x_BD, out_D)


@njit(**_PLAIN)
def squared_norms(start, stop, offsets, tokens_N, weights_N, x_BD, out_P):
    """``out[p] = |gradient row p|^2`` without storing the row."""
    row_D = np.empty(x_BD.shape[1], x_BD.dtype)
    for p in range(start, stop):
        out_P[p] = 0
        if offsets[p] < offsets[p + 1]:
            row_D[:] = 0
            _add_rows(weights_N, tokens_N, offsets[p], offsets[p + 1], x_BD, row_D)
            out_P[p] = _dot(row_D, row_D)


@njit(**_PLAIN)
def _adamw_row(row, moment, second, grad, decay, rest1, beta2, rest2, step_size, root_scale, eps):
    """One row of `kernels.AdamW`; ``rest = 1 - beta`` comes rounded once, from float64."""
    for d in range(len(row)):
        g = grad[d]
        m = moment[d] + rest1 * (g - moment[d])
        v = beta2 * second[d] + rest2 * (g * g)
        moment[d] = m
        second[d] = v
        row[d] = row[d] * decay - step_size * (m / (math.sqrt(v) * root_scale + eps))


@njit(**_PLAIN)
def _normalise(row):
    squared = _dot(row, row)
    if squared > 0:
        scale = row.dtype.type(1) / math.sqrt(squared)
        for d in range(len(row)):
            row[d] *= scale


@njit(**_PLAIN)
def adamw_entries(
    start, stop, weight_PD, moment_PD, second_PD, offsets, tokens_N, weights_N, x_BD,
    grad_scale, decay, rest1, beta2, rest2, step_size, root_scale, eps, unit_norm, only_touched,
):  # fmt: skip
    """Gradient row (summed from its entries), both moments, step and unit norm, one row after another.

    The gradient exists one row at a time, in the first-level cache.
    """
    grad = np.empty(weight_PD.shape[1], weight_PD.dtype)
    for p in range(start, stop):
        touched = offsets[p] < offsets[p + 1]
        if only_touched and not touched:
            continue
        grad[:] = 0
        if touched:
            _add_rows(weights_N, tokens_N, offsets[p], offsets[p + 1], x_BD, grad)
            for d in range(len(grad)):
                grad[d] *= grad_scale
        _adamw_row(
            weight_PD[p], moment_PD[p], second_PD[p], grad, decay, rest1, beta2, rest2, step_size, root_scale, eps
        )
        if unit_norm:
            _normalise(weight_PD[p])


@njit(**_PLAIN)
def adamw_dense(
    start, stop, weight_PD, moment_PD, second_PD, grad_PD,
    grad_scale, decay, rest1, beta2, rest2, step_size, root_scale, eps, unit_norm,
):  # fmt: skip
    """`adamw_entries` for a gradient that is a whole tensor."""
    grad = np.empty(weight_PD.shape[1], weight_PD.dtype)
    for p in range(start, stop):
        for d in range(len(grad)):
            grad[d] = grad_PD[p, d] * grad_scale
        _adamw_row(
            weight_PD[p], moment_PD[p], second_PD[p], grad, decay, rest1, beta2, rest2, step_size, root_scale, eps
        )
        if unit_norm:
            _normalise(weight_PD[p])
