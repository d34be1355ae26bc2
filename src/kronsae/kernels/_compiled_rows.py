# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types: one source for float32 and float64, compiled at first use.
"""Compiled loops of the CPU path over weight rows: decode, gradients as entries, optimiser; only `cpu` calls them.

As in `_compiled_selection`, parts may run in any order and give the same bits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kronsae.kernels._compiled_selection import PLAIN, SUMS


@njit(**PLAIN)
def _add_rows(weights, rows, first, last, matrix, out_D):
    """Compute ``out += sum_n weights[n] * matrix[rows[n]]``, eight rows at a time.

    ``out`` is loaded and stored once per eight rows, and eight rows stream from memory at once.
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


@njit(**PLAIN)
def weighted_rows(start, stop, weights_BR, rows_BR, matrix_PD, bias_D, out_BD):
    """Compute ``out[b] = bias + sum_r weights[b, r] * matrix[rows[b, r]]``; rows of weight 0 are not read."""
    weights = np.empty(rows_BR.shape[1], weights_BR.dtype)
    rows = np.empty(rows_BR.shape[1], np.int64)
    for b in range(start, stop):
        size = 0
        for r in range(rows_BR.shape[1]):
            weights[size], rows[size] = weights_BR[b, r], rows_BR[b, r]
            size += weights_BR[b, r] != 0
        out_D = out_BD[b]
        for d in range(len(out_D)):
            out_D[d] = bias_D[d]
        _add_rows(weights, rows, 0, size, matrix_PD, out_D)


@njit(**SUMS)
def _dot(a_D, b_D):
    total = a_D.dtype.type(0)
    for d in range(len(a_D)):
        total += a_D[d] * b_D[d]
    return total


@njit(**SUMS)
def sampled_products(start, stop, x_BD, matrix_PD, rows_BR, out_BR):
    """Compute ``out[b, r] = x[b] . matrix[rows[b, r]]``, four rows at a time: four memory streams instead of one.

    If the last rows of a token are all the same, as in padding, their product is computed once.
    """
    zero = x_BD.dtype.type(0)
    for b in range(start, stop):
        x_D = x_BD[b]
        entries = rows_BR.shape[1]
        while entries > 1 and rows_BR[b, entries - 1] == rows_BR[b, entries - 2]:
            entries -= 1
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
        if entries > 0:
            out_BR[b, entries:] = out_BR[b, entries - 1]


@njit(**PLAIN)
def count_entries(rows_BR, weights_BR, offsets):
    """Add the number of entries of row p to ``offsets[p + 2]``; entries of weight 0 do not count."""
    for b in range(rows_BR.shape[0]):
        for r in range(rows_BR.shape[1]):
            if weights_BR[b, r] != 0:
                offsets[rows_BR[b, r] + 2] += 1


@njit(**PLAIN)
def running_sum(offsets):
    """Replace offsets by their cumulative sum: ``offsets[p] = sum of offsets[:p + 1]``."""
    for p in range(1, len(offsets)):
        offsets[p] += offsets[p - 1]


@njit(**PLAIN)
def place_entries(rows_BR, weights_BR, first_token, offsets, tokens_N, weights_N):
    """Place each entry after those of its row placed before; afterwards row p spans offsets[p : p + 2]."""
    for b in range(rows_BR.shape[0]):
        for r in range(rows_BR.shape[1]):
            if weights_BR[b, r] != 0:
                at = offsets[rows_BR[b, r] + 1]
                tokens_N[at] = first_token + b
                weights_N[at] = weights_BR[b, r]
                offsets[rows_BR[b, r] + 1] = at + 1


@njit(**PLAIN)
def scatter_rows(start, stop, offsets, tokens_N, weights_N, x_BD, out_PD):
    """Compute ``out[p] = sum of weights[n] * x[tokens[n]]`` over the entries of row p; every row is written."""
    for p in range(start, stop):
        out_D = out_PD[p]
        for d in range(len(out_D)):
            out_D[d] = 0
        _add_rows(weights_N, tokens_N, offsets[p], offsets[p + 1], x_BD, out_D)


@njit(**PLAIN)
def squared_norms(start, stop, offsets, tokens_N, weights_N, x_BD, out_P):
    """Compute ``out[p] = |gradient row p|^2`` without storing the row."""
    row_D = np.empty(x_BD.shape[1], x_BD.dtype)
    for p in range(start, stop):
        out_P[p] = 0
        if offsets[p] < offsets[p + 1]:
            row_D[:] = 0
            _add_rows(weights_N, tokens_N, offsets[p], offsets[p + 1], x_BD, row_D)
            out_P[p] = _dot(row_D, row_D)


@njit(**PLAIN)
def _adamw_row(row, moment, second, grad, decay, rest1, beta2, rest2, step_size, root_scale, eps):
    """Update one row as `kernels.AdamW`; ``rest = 1 - beta`` is rounded once, from float64."""
    for d in range(len(row)):
        g = grad[d]
        m = moment[d] + rest1 * (g - moment[d])
        v = beta2 * second[d] + rest2 * (g * g)
        moment[d] = m
        second[d] = v
        row[d] = row[d] * decay - step_size * (m / (math.sqrt(v) * root_scale + eps))


@njit(**PLAIN)
def _normalise(row):
    squared = _dot(row, row)
    if squared > 0:
        scale = row.dtype.type(1) / math.sqrt(squared)
        for d in range(len(row)):
            row[d] *= scale


@njit(**PLAIN)
def adamw_entries(
    start, stop, weight_PD, moment_PD, second_PD, offsets, tokens_N, weights_N, x_BD,
    grad_scale, decay, rest1, beta2, rest2, step_size, root_scale, eps, unit_norm, only_touched,
):  # fmt: skip
    """Update row by row: gradient (summed from its entries), both moments, step and unit norm.

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


@njit(**PLAIN)
def adamw_dense(
    start, stop, weight_PD, moment_PD, second_PD, grad_PD,
    grad_scale, decay, rest1, beta2, rest2, step_size, root_scale, eps, unit_norm,
):  # fmt: skip
    """Update row by row as `adamw_entries`, with a dense gradient."""
    grad = np.empty(weight_PD.shape[1], weight_PD.dtype)
    for p in range(start, stop):
        for d in range(len(grad)):
            grad[d] = grad_PD[p, d] * grad_scale
        _adamw_row(
            weight_PD[p], moment_PD[p], second_PD[p], grad, decay, rest1, beta2, rest2, step_size, root_scale, eps
        )
        if unit_norm:
            _normalise(weight_PD[p])
