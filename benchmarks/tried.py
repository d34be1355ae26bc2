"""Measure the variants in the kernels' README: each implementation and the alternative that it replaced.

    python benchmarks/tried.py [--out benchmarks/results/tried.csv]

All variants run in one process and alternate; the results are the median and quartiles.
D = 768, H = 1024, M = 4, N = 8, B = 1024.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from kronsae.bench.measure import interleaved
from kronsae.kernels import _compiled_selection
from kronsae.kernels.threads import run_parts, split_evenly
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns

D, H, M, N, K, B = 768, 1024, 4, 8, 32, 1024


class Call:
    """Wrap a function of a batch for `interleaved`."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        self._function = function

    def step(self, x_BD: Tensor) -> None:
        self._function(x_BD)


@numba.njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def bounds_of_any_size(start, stop, pre_BP, bias_P, best_BH, d_base, width):  # type: ignore[no-untyped-def]
    """Compute `_compiled_selection.head_maxima` with sizes that are known only at run time."""
    for b in range(start, stop):
        for head in range(best_BH.shape[1]):
            row = head * width
            base = extension = np.float32(0)
            for i in range(d_base):
                base = max(base, pre_BP[b, row + i] + bias_P[row + i])
            for j in range(d_base, width):
                extension = max(extension, pre_BP[b, row + j] + bias_P[row + j])
            best_BH[b, head] = base * extension


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def bounds_by_prange(pre_BP, bias_P, best_BH, d_base, width):  # type: ignore[no-untyped-def]
    """Compute the same on numba's threads."""
    for b in numba.prange(pre_BP.shape[0]):
        for head in range(best_BH.shape[1]):
            row = head * width
            base = extension = np.float32(0)
            for i in range(d_base):
                base = max(base, pre_BP[b, row + i] + bias_P[row + i])
            for j in range(d_base, width):
                extension = max(extension, pre_BP[b, row + j] + bias_P[row + j])
            best_BH[b, head] = base * extension


@numba.njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def maxima_of_blocks(start, stop, values_BF, out_BL):  # type: ignore[no-untyped-def]
    """Compute the maximum of each contiguous block, a reduction that is not vectorised."""
    size = values_BF.shape[1] // out_BL.shape[1]
    for b in range(start, stop):
        for lane in range(out_BL.shape[1]):
            best = values_BF[b, lane * size]
            for f in range(lane * size + 1, (lane + 1) * size):
                best = max(best, values_BF[b, f])
            out_BL[b, lane] = best


@numba.njit(nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")  # type: ignore[untyped-decorator]
def maxima_of_lanes(start, stop, values_BF, out_BL):  # type: ignore[no-untyped-def]
    """Compute the maximum of each strided lane, as elementwise maxima of contiguous rows."""
    lanes = out_BL.shape[1]
    for b in range(start, stop):
        for lane in range(lanes):
            out_BL[b, lane] = values_BF[b, lane]
        for first in range(lanes, values_BF.shape[1], lanes):
            for lane in range(lanes):
                out_BL[b, lane] = max(out_BL[b, lane], values_BF[b, first + lane])


def cases(seed: int) -> dict[str, dict[str, Callable[[Tensor], object]]]:
    """Return the variants of each question, the one in use first."""
    generator = torch.Generator().manual_seed(seed)
    weight_PD = torch.randn(H * (M + N), D, generator=generator)
    pre_BP = torch.randn(B, H * (M + N), generator=generator).numpy()
    bias_P, best_BH = np.zeros(H * (M + N), np.float32), np.empty((B, H), np.float32)
    dense_BF, lanes_BL = torch.randn(B, H * M * N, generator=generator).numpy(), np.empty((B, 256), np.float32)
    reused_BP = torch.empty(B, H * (M + N))
    narrow_PD = weight_PD.bfloat16()
    specialised = _compiled_selection.head_maxima(M, N, True)
    return {
        "head maxima: compiled per head shape, or sizes at run time": {
            "per shape": lambda x_BD: run_parts(specialised, split_evenly(B), pre_BP, bias_P, best_BH, best_BH),
            "at run time": lambda x_BD: run_parts(
                bounds_of_any_size, split_evenly(B), pre_BP, bias_P, best_BH, M, M + N
            ),
        },
        "head maxima after a product: plain threads, or numba's": {
            "plain threads": lambda x_BD: (
                torch.mm(x_BD, weight_PD.T, out=reused_BP),
                run_parts(bounds_of_any_size, split_evenly(B), pre_BP, bias_P, best_BH, M, M + N),
            ),
            "numba's threads": lambda x_BD: (
                torch.mm(x_BD, weight_PD.T, out=reused_BP),
                bounds_by_prange(pre_BP, bias_P, best_BH, M, M + N),
            ),
        },
        "maxima of 32,768 outputs: strided lanes, or blocks": {
            "strided lanes": lambda x_BD: run_parts(maxima_of_lanes, split_evenly(B), dense_BF, lanes_BL),
            "blocks": lambda x_BD: run_parts(maxima_of_blocks, split_evenly(B), dense_BF, lanes_BL),
        },
        "encoder product: into a reused buffer, or a fresh one": {
            "reused": lambda x_BD: torch.mm(x_BD, weight_PD.T, out=reused_BP),
            "fresh": lambda x_BD: x_BD @ weight_PD.T,
        },
        "encoder product: float32, or bfloat16": {
            "float32": lambda x_BD: torch.mm(x_BD, weight_PD.T, out=reused_BP),
            "bfloat16": lambda x_BD: x_BD.bfloat16() @ narrow_PD.T,
        },
    }


def main() -> None:
    """Measure every case, print the times and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    numba.set_num_threads(torch.get_num_threads())
    rows = []
    for question, contestants in cases(arguments.seed).items():
        timings = interleaved(
            {name: Call(function) for name, function in contestants.items()}, B, D, arguments.rounds, arguments.seed
        )
        for name, timing in timings.items():
            print(f"{question}: {name} {timing.median_ms:.1f} ms ({timing.low_ms:.1f} to {timing.high_ms:.1f})")
            times = {
                "median_ms": timing.median_ms,
                "low_quartile_ms": timing.low_ms,
                "high_quartile_ms": timing.high_ms,
            }
            rows.append(
                {
                    "question": question,
                    "contestant": name,
                    **{key: round(value, 3) for key, value in times.items()},
                    "rounds": timing.rounds,
                    **provenance_columns(arguments.seed),
                }
            )
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
