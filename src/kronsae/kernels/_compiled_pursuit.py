# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# Types are numba's to infer: one source for float32 and float64, compiled at first use.
"""The loop of the CPU path over tokens that carries out a pursuit; `cpu` is its only caller.

What `_compiled_selection` says of its loops holds for this one: parts in any order, the same bits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kronsae.kernels._compiled_rows import _add_rows, _dot
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
def _ratio(above, below, least, zero):
    """``above / below``; 0 if ``below`` is less than ``least``, or one of them is not finite."""
    return above / below if below >= least and math.isfinite(below) and math.isfinite(above) else zero


@njit(**SUMS)
def _refit(
    steps, is_last, count, rows, values, inverse_norm_F, matrix_FD, residual_D, least,
    grads, last_grads, directions, changes, excesses, raised_rows, moved_D,
):  # fmt: skip
    """`pursuit.refit_by` of one token: change ``values`` in place, and the residual too unless nothing reads it.

    All arrays from ``grads`` on are scratch: what they hold before does not matter.
    """
    zero, one = values.dtype.type(0), values.dtype.type(1)
    last_square = zero
    for t in range(steps):
        _products(residual_D, matrix_FD, rows, count, grads)
        square, difference = zero, zero
        for n in range(count):
            grad = grads[n] * inverse_norm_F[rows[n]]
            grad = grad if values[n] > 0 or grad > 0 else zero
            square += grad * grad
            difference += grad * (grad - last_grads[n])
            grads[n] = grad
        kept = _ratio(difference, last_square, least, zero) if t > 0 else zero
        product = zero
        for n in range(count):
            free = grads[n] != 0 or values[n] > 0
            direction = grads[n] if free else zero
            if free and kept > 0:
                direction += kept * directions[n]
            product += direction * grads[n]
            directions[n], changes[n], last_grads[n] = direction, direction * inverse_norm_F[rows[n]], grads[n]
        last_square = square
        moved_D[:] = zero
        _add_rows(changes, rows, 0, count, matrix_FD, moved_D)
        share = _ratio(product, _dot(moved_D, moved_D), least, zero)
        raised = 0
        for n in range(count):
            change = share * changes[n]
            excess = -values[n] - change
            excesses[raised], raised_rows[raised] = excess, rows[n]
            raised += excess > 0
            changes[n] = -values[n] if excess > 0 else change
        if raised > 0:
            for d in range(len(moved_D)):
                moved_D[d] *= share
            _add_rows(excesses, raised_rows, 0, raised, matrix_FD, moved_D)
            share = min(one, max(zero, _ratio(_dot(moved_D, residual_D), _dot(moved_D, moved_D), least, zero)))
            for n in range(count):
                changes[n] *= share
            last_square = zero
        for n in range(count):
            value = values[n] + changes[n]
            values[n] = zero if value < 0 else value  # NaN stays
        if not is_last or t + 1 < steps:
            for d in range(len(residual_D)):
                residual_D[d] -= share * moved_D[d]


@njit(**PLAIN)
def pursue(
    start, stop, target_BD, matrix_FD, inverse_norm_F, values_BC, latents_BC,
    sizes_R, steps_R, first_share, least, values_BK, latents_BK, places_BK,
):  # fmt: skip
    """`reference.pursue` of some tokens.

    A token's residual and what is chosen stay in the first-level cache, the rows of its candidates in the second.
    """
    candidates, k, rounds = values_BC.shape[1], values_BK.shape[1], len(sizes_R)
    zero = values_BC.dtype.type(0)
    residual_D = np.empty(target_BD.shape[1], target_BD.dtype)
    left_latents, left_places = np.empty(candidates, np.int64), np.empty(candidates, np.int64)
    scores, marks = np.empty(candidates, values_BC.dtype), np.empty(candidates, np.bool_)
    rows, columns, places, raised_rows = np.empty(
        (4, k + 1), np.int64
    )  # one more place than is needed: written, never read
    values, removed, grads, last_grads, directions, excesses = np.zeros((6, k + 1), values_BC.dtype)
    moved_D = np.empty_like(residual_D)
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
            if r + 1 < rounds or steps_R[r] > 0:
                _add_rows(removed, rows, known, count, matrix_FD, residual_D)
            _refit(
                steps_R[r], r + 1 == rounds, count, rows, values, inverse_norm_F, matrix_FD, residual_D, least,
                grads, last_grads, directions, removed, excesses, raised_rows, moved_D,
            )  # fmt: skip
        for n in range(count):
            column = columns[n]
            values_BK[b, column], latents_BK[b, column], places_BK[b, column] = values[n], rows[n], places[n]
