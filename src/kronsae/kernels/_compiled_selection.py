# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types: one source for float32 and float64, compiled at first use.
"""Compiled loops of the CPU path over tokens, which select latents of a Kronecker encoder; only `cpu` calls them.

Each kernel works on the items ``start <= i < stop`` of its first axis (tokens or weight rows) and writes only the
outputs of these items. The parts may therefore run on different threads in any order and give the same bits. The
kernels release the GIL and use no threading layer of numba: its OpenMP layer is a second pool next to PyTorch's, and
the two may wait for each other (`benchmarks/tried.py` measures it).

Every comparison with NaN is false, so the selections rank NaN with the zeros: every row index they write is valid.

Loops that add in a fixed order are compiled without ``reassoc``. Dot products and squared norms are compiled with it;
their order is fixed by the compiled code. Compiled code is cached beside the module (like .pyc files), or in numba's
user cache if that folder cannot be written, or in ``NUMBA_CACHE_DIR``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import njit

PLAIN: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
SUMS: dict[str, Any] = PLAIN | {"fastmath": {"contract", "reassoc", "nsz"}}
MAXIMA: dict[str, Any] = PLAIN | {"fastmath": {"contract", "nsz"}}
LAST = 2**62
"""Above every index."""


@njit(**PLAIN)
def _worse(value_a, index_a, value_b, index_b):
    """Return whether a ranks below b: by value; for equal values the larger index ranks below."""
    return value_a < value_b or (value_a == value_b and index_a > index_b)


@njit(**PLAIN)
def _sift(values, indices, hole, size):
    """Restore the heap order (worst first) below ``hole``."""
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


@njit(**PLAIN)
def _offer(values, indices, size, value, index):
    """Offer a candidate to a heap of the best ``len(values)``; return how many the heap holds."""
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


@njit(**SUMS)
def _count_from(values, size, least):
    """Return how many of the first ``size`` values are at least ``least``; exact below 2**24.

    Counted in the type of the values, which is vectorised at its full width.
    """
    one, zero = values.dtype.type(1), values.dtype.type(0)
    count = zero
    for n in range(size):
        count += one if values[n] >= least else zero
    return int(count)


@njit(**MAXIMA)
def _largest_below(values, size, limit):
    """Return the largest of the first ``size`` values that is below ``limit``; 0 if none is positive."""
    largest = values.dtype.type(0)
    for n in range(size):
        value = values[n] if values[n] < limit else values.dtype.type(0)
        largest = value if value > largest else largest
    return largest


@njit(**PLAIN)
def _lower_bound(best, k):
    """Return a number that at least k of ``best`` reach, and few more; 0 if fewer than k are positive.

    Bisection between 0 and the largest. A count has no branch to mispredict: faster than a heap.
    """
    low, high = best.dtype.type(0), _largest_below(best, len(best), best.dtype.type(math.inf))
    half = best.dtype.type(0.5)
    for _ in range(16):
        middle = low + half * (high - low)
        count = _count_from(best, len(best), middle)
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + k // 4:
                break
    return low


@njit(**PLAIN)
def _cut(values, indices, size, k, low):
    """Return where ``size > k`` values are cut to the k largest: the least value kept, and up to which index of equals.

    At least k values are at least ``low`` and above 0. Of equal values the smaller indices are kept. Bisection: at
    least k values reach ``low``, fewer reach ``high``. It ends where exactly k reach ``low``, or where no number lies
    between the two.
    """
    infinite = values.dtype.type(math.inf)
    high = _largest_below(values, size, infinite)
    if _count_from(values, size, infinite) >= k:
        low = infinite
    elif _count_from(values, size, high) >= k:
        low = high
    half = values.dtype.type(0.5)
    while low < high:
        middle = low + half * (high - low)
        if not (low < middle and middle < high):
            break
        count = _count_from(values, size, middle)
        if count < k:
            high = middle
        else:
            low = middle
            if count == k:
                return low, LAST
    left = k  # places for values equal to ``low``
    equal = 0
    for n in range(size):
        left -= values[n] > low
        equal += values[n] == low
    if equal <= left:
        return low, LAST
    last = -1
    for _ in range(left):
        next_index = -1
        for n in range(size):
            if values[n] == low and indices[n] > last and (next_index < 0 or indices[n] < next_index):
                next_index = indices[n]
        last = next_index
    return low, last


@njit(**PLAIN)
def _keep_best(values, indices, size, k, low):
    """Keep the k largest of ``size`` values, in their order; return how many are kept. `_cut` has the rules."""
    if size <= k:
        return size
    low, last = _cut(values, indices, size, k, low)
    kept = 0
    for n in range(size):
        value, index = values[n], indices[n]
        values[kept], indices[kept] = value, index
        kept += value > low or (value == low and index <= last)
    return kept


@functools.cache
def head_maxima(d_base, d_extension, multiplied, null=False):
    """Compile ``base = max(0, max_i u_i)`` and ``extension = max(0, max_j v_j)`` for one head shape.

    With ``multiplied``, the head's largest key (`_key`) is written to the base's output and nothing else: their
    product, or with null symbols the square of their difference if that is larger. Because both sizes are known, the
    loops over them unroll (`benchmarks/tried.py` measures the gain).
    """
    width = d_base + d_extension

    @njit(**MAXIMA)
    def maxima(start, stop, pre_BP, bias_P, base_BH, extension_BH):
        zero = pre_BP.dtype.type(0)
        for b in range(start, stop):
            for head in range(base_BH.shape[1]):
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
                if multiplied:
                    best = largest_base * largest_extension
                    best = best if best > 0 else zero  # inf * 0 is NaN
                    if null:
                        gap = largest_base - largest_extension
                        best = gap * gap if gap * gap > best else best
                    base_BH[b, head] = best
                else:
                    base_BH[b, head] = largest_base
                    extension_BH[b, head] = largest_extension

    return maxima


@njit(**PLAIN)
def _largest_row(pre_P, bias_P, start, stop):
    """Return the first row with the largest pre-latent; NaN is never the largest."""
    largest = pre_P.dtype.type(-math.inf)
    found = start
    for row in range(start, stop):
        value = pre_P[row] + bias_P[row]
        if value > largest:
            largest, found = value, row
    return found


@njit(**PLAIN, forceinline=True)
def _list_head(pre_P, bias_P, head, d_base, d_extension, null, least, values, indices, size):
    """Append every positive key of one head that is at least ``least``; return the new size.

    Every key is written, and the size grows only for those that stay: without null symbols, no branch to mispredict.
    """
    row = head * (d_base + d_extension)
    first_extension = row + d_base
    latent = head * ((d_base + null) * (d_extension + null) - null)
    zero = pre_P.dtype.type(0)
    largest_base = largest_extension = zero
    if null:
        rival = _largest_row(pre_P, bias_P, row, first_extension)
        largest_base = max(zero, pre_P[rival] + bias_P[rival])
        rival = _largest_row(pre_P, bias_P, first_extension, first_extension + d_extension)
        largest_extension = max(zero, pre_P[rival] + bias_P[rival])
    for i in range(d_base):
        base = max(zero, pre_P[row + i] + bias_P[row + i])  # a base that is not positive makes no product positive
        for j in range(d_extension):
            product = base * (pre_P[first_extension + j] + bias_P[first_extension + j])
            values[size], indices[size] = product, latent
            size += (product > zero) & (product >= least)
            latent += 1
        if null:
            gap = base - largest_extension
            values[size], indices[size] = gap * gap, latent
            size += gap > 0 and gap * gap > 0 and gap * gap >= least
            latent += 1
    if null:
        for j in range(d_extension):
            gap = pre_P[first_extension + j] + bias_P[first_extension + j] - largest_base
            values[size], indices[size] = gap * gap, latent + j
            size += gap > 0 and gap * gap > 0 and gap * gap >= least
    return size


@njit(**PLAIN)
def _reaching_heads(best_H, least, heads):
    """List the heads whose largest key is positive and at least ``least``; return how many. It has no branch."""
    size = 0
    for head in range(len(best_H)):
        heads[size] = head
        size += (best_H[head] > 0) & (best_H[head] >= least)
    return size


@njit(**PLAIN, forceinline=True)
def _divided(number, by):
    """Compute ``number // by`` of numbers that are not negative, without the instructions for signs."""
    return np.int64(np.uint64(number) // np.uint64(by))


@njit(**PLAIN, forceinline=True)
def _parents(pre_P, bias_P, latent, d_base, d_extension, null):
    """Return the rows of both parents and which of them is absent (0 neither, 1 the extension, 2 the base).

    The row of an absent one is that of its head's largest.
    """
    cells = (d_base + null) * (d_extension + null) - null
    head = _divided(latent, cells)
    cell = latent - head * cells
    row = head * (d_base + d_extension)
    i = _divided(cell, d_extension + null)
    base, extension, absent = row + i, row + d_base + cell - i * (d_extension + null), 0
    if null and extension == row + d_base + d_extension:
        extension, absent = _largest_row(pre_P, bias_P, row + d_base, row + d_base + d_extension), 1
    elif null and i == d_base:
        base, absent = _largest_row(pre_P, bias_P, row, row + d_base), 2
    return base, extension, absent


@njit(**PLAIN)
def _key(pre_P, bias_P, latent, d_base, d_extension, null):
    """Return what ranks a latent: ``relu(u) relu(v)``, or for one parent w alone ``relu(w - relu(rival))^2``."""
    base, extension, absent = _parents(pre_P, bias_P, latent, d_base, d_extension, null)
    zero = pre_P.dtype.type(0)
    u, v = max(zero, pre_P[base] + bias_P[base]), max(zero, pre_P[extension] + bias_P[extension])
    if absent == 0:
        return u * v
    gap = u - v if absent == 1 else v - u
    return gap * gap if gap > 0 else zero


@njit(**PLAIN)
def _write(pre_P, bias_P, indices, d_base, d_extension, null, out_index, out_row, out_pre):
    """Write the chosen latents, their parents' rows (bases, then extensions) and their parents' values."""
    k = len(indices)
    for n in range(k):
        base, extension, _ = _parents(pre_P, bias_P, indices[n], d_base, d_extension, null)
        out_index[n] = indices[n]
        out_row[n] = base
        out_row[k + n] = extension
        out_pre[n] = pre_P[base] + bias_P[base]
        out_pre[k + n] = pre_P[extension] + bias_P[extension]


@njit(**PLAIN)
def kronecker_topk(
    start, stop, pre_BP, bias_P, best_BH, d_base, d_extension, null, out_index_BK, out_row_BR, out_pre_BR
):  # fmt: skip
    """Select the k largest keys of each token, by value, then smaller index; zeros fill up by index."""
    k = out_index_BK.shape[1]
    cells = best_BH.shape[1] * ((d_base + null) * (d_extension + null) - null)
    values = np.empty(cells + 1, pre_BP.dtype)  # one more than there are: written, never kept
    indices = np.empty(max(k, cells + 1), np.int64)
    heads = np.empty(best_BH.shape[1] + 1, np.int64)  # here too
    for b in range(start, stop):
        pre_P, best_H = pre_BP[b], best_BH[b]
        least = _lower_bound(best_H, k)
        size = 0
        for n in range(_reaching_heads(best_H, least, heads)):
            size = _list_head(pre_P, bias_P, heads[n], d_base, d_extension, null, least, values, indices, size)
        size = _keep_best(values, indices, size, k, least)
        latent = 0
        while size < k:
            if not _key(pre_P, bias_P, latent, d_base, d_extension, null) > 0:
                indices[size] = latent
                size += 1
            latent += 1
        _write(pre_P, bias_P, indices[:k], d_base, d_extension, null, out_index_BK[b], out_row_BR[b], out_pre_BR[b])


@njit(**PLAIN)
def kronecker_topk_among(
    start, stop, pre_BP, bias_P, best_BH, d_base, d_extension, null, latents_C, ends_H,
    out_index_BK, out_row_BR, out_pre_BR,
):  # fmt: skip
    """Select as `kronecker_topk` from the sorted ``latents`` only; those of head h end at ``ends[h]``.

    A head's bound is only an upper bound here, so heads are compared with the running k-th value.
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
                    key = _key(pre_P, bias_P, latents_C[c], d_base, d_extension, null)
                    if key > 0:
                        size = _offer(values, indices, size, key, latents_C[c])
            first = last
        c = 0
        while size < k:
            if not _key(pre_P, bias_P, latents_C[c], d_base, d_extension, null) > 0:
                indices[size] = latents_C[c]
                size += 1
            c += 1
        _write(pre_P, bias_P, indices, d_base, d_extension, null, out_index_BK[b], out_row_BR[b], out_pre_BR[b])


@njit(**PLAIN)
def _longer(array_N, size):
    """Return a copy with at least ``size`` entries, at least twice as long."""
    grown_N = np.empty(max(size, 2 * len(array_N)), array_N.dtype)
    grown_N[: len(array_N)] = array_N
    return grown_N


@njit(**PLAIN)
def _list_products(pre_P, bias_P, heads, d_base, d_extension, least_F, u_N, v_N, latents_N, size):
    """Append the positive pairs of these heads whose product reaches their ``least``; return the new size."""
    for head in heads:
        row = head * (d_base + d_extension)
        first_extension = row + d_base
        for i in range(d_base):
            base = pre_P[row + i] + bias_P[row + i]
            if base <= 0:
                continue
            for j in range(d_extension):
                extension = pre_P[first_extension + j] + bias_P[first_extension + j]
                latent = (head * d_base + i) * d_extension + j
                if extension > 0 and base * extension >= least_F[latent]:
                    u_N[size], v_N[size], latents_N[size] = base, extension, latent
                    size += 1
    return size


@njit(**PLAIN)
def products_from(start, stop, pre_BP, bias_P, d_base, d_extension, best_BH, least_H, least_F, counts_B):
    """Return latents, u and v of the pairs with ``u > 0``, ``v > 0`` and ``u v >= least`` of the latent.

    Ordered by token, then latent; ``counts[b]`` is set to the number of token b. ``least_H`` is the smallest ``least``
    of each head: a head whose best product is below it is skipped.
    """
    u_N = np.empty(64 * (stop - start), pre_BP.dtype)
    v_N = np.empty(len(u_N), pre_BP.dtype)
    latents_N = np.empty(len(u_N), np.int64)
    heads_H = np.empty(best_BH.shape[1], np.int64)
    size = 0
    for b in range(start, stop):
        before = size
        found = 0
        for head in range(best_BH.shape[1]):
            heads_H[found] = head
            found += best_BH[b, head] >= least_H[head]
        most = size + found * d_base * d_extension
        if most > len(u_N):
            u_N, v_N, latents_N = _longer(u_N, most), _longer(v_N, most), _longer(latents_N, most)
        size = _list_products(
            pre_BP[b], bias_P, heads_H[:found], d_base, d_extension, least_F, u_N, v_N, latents_N, size
        )
        counts_B[b] = size - before
    return latents_N[:size], u_N[:size], v_N[:size]


@njit(**PLAIN)
def pairs_at(start, stop, pre_BP, bias_P, d_base, d_extension, null, index_BK, out_index_BK, out_row_BR, out_pre_BR):
    """Write the given latents, their parents' rows and their parents' values."""
    for b in range(start, stop):
        _write(pre_BP[b], bias_P, index_BK[b], d_base, d_extension, null, out_index_BK[b], out_row_BR[b], out_pre_BR[b])
