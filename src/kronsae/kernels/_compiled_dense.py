# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# numba infers the types: one source for float32 and float64, compiled at first use.
"""Compiled loops of the CPU path over tokens, which select latents of a dense encoder; only `cpu` calls them.

What `_compiled_selection` says of its loops holds for these.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kronsae.kernels._compiled_selection import PLAIN, _keep_best, _longer, _lower_bound

LANES = 1024


@njit(**PLAIN)
def _lane_maxima(pre_F, bias_F, best_L):
    """Compute ``best[l] = max(0, max of pre + bias over the latents congruent to l modulo LANES)``.

    One vectorised pass computes all lanes (134 MB in 8 ms; maxima of contiguous blocks took 20 ms).
    """
    width = len(pre_F)
    best_L[:] = 0
    for first in range(0, width, LANES):
        for lane in range(min(LANES, width - first)):
            value = pre_F[first + lane] + bias_F[first + lane]
            best_L[lane] = value if value > best_L[lane] else best_L[lane]


@njit(**PLAIN)
def lane_maxima(start, stop, pre_BF, bias_F, best_BL):
    """Compute the lane maxima of each token, which bound lanes as `head_maxima` with ``multiplied`` bounds heads."""
    for b in range(start, stop):
        _lane_maxima(pre_BF[b], bias_F, best_BL[b])


@njit(**PLAIN)
def topk(start, stop, pre_BF, bias_F, out_value_BK, out_index_BK):
    """Select the k largest of ``relu(pre + bias)`` per token, as `kronecker_topk` with lanes in place of heads."""
    width = pre_BF.shape[1]
    k = out_index_BK.shape[1]
    values = np.empty(width + 1, pre_BF.dtype)  # one more than there are: written, never kept
    indices = np.empty(width + 1, np.int64)
    best_L = np.empty(min(LANES, width), pre_BF.dtype)
    for b in range(start, stop):
        pre_F = pre_BF[b]
        _lane_maxima(pre_F, bias_F, best_L)
        least = _lower_bound(best_L, k)
        size = 0
        for lane in range(len(best_L)):
            if best_L[lane] >= least and best_L[lane] > 0:
                for f in range(lane, width, LANES):
                    value = pre_F[f] + bias_F[f]
                    values[size], indices[size] = value, f
                    size += value > 0 and value >= least
        size = _keep_best(values, indices, size, k, least)
        f = 0
        while size < k:
            if not pre_F[f] + bias_F[f] > 0:
                indices[size] = f
                size += 1
            f += 1
        for n in range(k):
            out_index_BK[b, n] = indices[n]
            out_value_BK[b, n] = pre_F[indices[n]] + bias_F[indices[n]]


_BLOCK = 32


@njit(**PLAIN)
def above(start, stop, pre_BF, bias_F, thresholds_F, counts_B):
    """Return the latents whose outputs ``pre + bias`` are above their thresholds, and these outputs.

    Ordered by token, then latent; ``counts[b]`` is set to the number of token b. A vectorised loop counts the hits
    of each block of `_BLOCK` latents; only blocks with a hit are scanned one by one.
    """
    width = pre_BF.shape[1]
    values_N = np.empty(64 * (stop - start), pre_BF.dtype)
    latents_N = np.empty(len(values_N), np.int64)
    size = 0
    for b in range(start, stop):
        pre_F = pre_BF[b]
        before = size
        for s in range(-(-width // _BLOCK)):
            first = s * _BLOCK
            count = 0
            for j in range(min(_BLOCK, width - first)):
                count += pre_F[first + j] + bias_F[first + j] > thresholds_F[first + j]
            if size + count > len(values_N):
                values_N, latents_N = _longer(values_N, size + count), _longer(latents_N, size + count)
            f = first
            while count > 0:
                value = pre_F[f] + bias_F[f]
                if value > thresholds_F[f]:
                    values_N[size], latents_N[size] = value, f
                    size += 1
                    count -= 1
                f += 1
        counts_B[b] = size - before
    return latents_N[:size], values_N[:size]


@njit(**PLAIN)
def lay_out(start, stop, ends_B, values_N, latents_N, out_value_BK, out_index_BK):
    """Write the concatenated lists of all tokens as one row per token, filled up with latent 0 and value 0."""
    for b in range(start, stop):
        first = ends_B[b - 1] if b > 0 else 0
        size = ends_B[b] - first
        for n in range(size):
            out_value_BK[b, n] = values_N[first + n]
            out_index_BK[b, n] = latents_N[first + n]
        out_value_BK[b, size:] = 0
        out_index_BK[b, size:] = 0
