# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# Types are numba's to infer: one source for float32 and float64, compiled at first use.
"""The loop of the CPU path over tokens that carries out a pursuit; `cpu` is its only caller.

What `_compiled_selection` says of its loops holds for this one: parts in any order, the same bits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kronsae.kernels._compiled_rows import _add_rows
from kronsae.kernels._compiled_selection import PLAIN, SUMS, _cut


@njit(**SUMS)
def _products(x_D, matrix_FD, rows, size, out):
    """``out[n] = x . matrix[rows[n]]``, four rows at a time."""
    zero = x_D.dtype.type(0)
    n = 0
    while n + 3 < size:
        row0, row1, row2, row3 = rows[n], rows[n + 1], rows[n + 2], rows[n + 3]
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        for d in range(len(x_D)):
            sum0 += x_D[d] * matrix_FD[row0, d]
            sum1 += x_D[d] * matrix_FD[row1, d]
            sum2 += x_D[d] * matrix_FD[row2, d]
            sum3 += x_D[d] * matrix_FD[row3, d]
        out[n], out[n + 1], out[n + 2], out[n + 3] = sum0, sum1, sum2, sum3
        n += 4
    while n < size:
        total = zero
        for d in range(len(x_D)):
            total += x_D[d] * matrix_FD[rows[n], d]
        out[n] = total
        n += 1


@njit(**PLAIN)
def _mark_best(scores, latents, left, size, marks):
    """Mark the ``size`` best positive scores, of equal ones the smaller latents."""
    positive = 0
    for c in range(left):
        marks[c] = scores[c] > 0
        positive += marks[c]
    if positive > size:
        low, last = _cut(scores, latents, left, size, scores.dtype.type(0))
        for c in range(left):
            marks[c] = scores[c] > low or (scores[c] == low and latents[c] <= last)


@njit(**PLAIN)
def pursue(
    start, stop, target_BD, matrix_FD, inverse_norm_F, values_BC, latents_BC,
    sizes_R, refit, step, first_share, values_BK, latents_BK, places_BK,
):  # fmt: skip
    """`reference.pursue` of some tokens.

    A token's residual and what is chosen stay in the first-level cache, the rows of its candidates in the second.
    """
    candidates, k, rounds = values_BC.shape[1], values_BK.shape[1], len(sizes_R)
    zero = values_BC.dtype.type(0)
    residual_D = np.empty(target_BD.shape[1], target_BD.dtype)
    left_latents, left_places = np.empty(candidates, np.int64), np.empty(candidates, np.int64)
    scores, marks = np.empty(candidates, values_BC.dtype), np.empty(candidates, np.bool_)
    rows, columns, places = np.empty((3, k + 1), np.int64)  # one more place than is needed: written, never read
    values, products, removed = np.empty((3, k + 1), values_BC.dtype)
    for b in range(start, stop):
        finite, left = True, 0
        for c in range(candidates):
            finite &= math.isfinite(values_BC[b, c])
            if values_BC[b, c] > 0:
                left_latents[left], left_places[left], scores[left] = latents_BC[b, c], c, values_BC[b, c]
                left += 1
        values_BK[b] = zero if finite else math.nan
        latents_BK[b] = 0
        places_BK[b] = -1
        if not finite:
            continue
        residual_D[:] = target_BD[b]
        count, column = 0, 0
        for r in range(rounds):
            if r > 0:
                _products(residual_D, matrix_FD, left_latents, left, scores)
                for c in range(left):
                    scores[c] *= inverse_norm_F[left_latents[c]]
            _mark_best(scores, left_latents, left, sizes_R[r], marks)
            known, kept = count, 0
            for c in range(left):
                latent, place = left_latents[c], left_places[c]
                rows[count], places[count], values[count] = latent, place, scores[c]
                left_latents[kept], left_places[kept] = latent, place
                count += marks[c]
                kept += not marks[c]
            left = kept
            for n in range(known, count):
                if r > 0:
                    values[n] = first_share * values[n] * inverse_norm_F[rows[n]]
                columns[n], removed[n] = column + n - known, -values[n]
            column += sizes_R[r]
            if r + 1 < rounds or refit > 0:
                _add_rows(removed, rows, known, count, matrix_FD, residual_D)
            for t in range(refit):
                _products(residual_D, matrix_FD, rows, count, products)
                for n in range(count):
                    inverse = inverse_norm_F[rows[n]]
                    value = values[n] + step * products[n] * inverse * inverse
                    value = zero if value < 0 else value
                    removed[n] = values[n] - value
                    values[n] = value
                if r + 1 < rounds or t + 1 < refit:
                    _add_rows(removed, rows, 0, count, matrix_FD, residual_D)
        for n in range(count):
            column = columns[n]
            values_BK[b, column], latents_BK[b, column], places_BK[b, column] = values[n], rows[n], places[n]
