"""Measure whether exact screening of heads with an int8 product is faster than the float32 product.

The bound: let ``x = xq + rx`` and ``w = wq + rw``, where q is the int8 value times its row's scale and r the remainder.
By Cauchy-Schwarz ``|x.w - xq.wq| <= |xq| |rw| + |rx| |w|``, which is known per token and row before the product. This
gives an interval for every pre-latent and for the largest product of every head. A head whose upper bound is below the
k-th largest lower bound cannot contain a selected latent. The remaining heads must be recomputed in float32 for that
token.

The script prints the number of remaining heads, the time of the int8 product, and the time of recomputing the remaining
heads with one float32 product per head over the tokens that need it. ``selection_exact`` checks the bound: every head
with a selected latent must be among the remaining heads.

    python benchmarks/int8_screening.py [--seed 0] [--out benchmarks/results/int8_screening.csv]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from kronsae.kernels import kronecker_topk
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns

D, H, M, N, K, B = 768, 1024, 4, 8, 32, 1024


def quantise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return int8 values, row scales, norms of the rounded rows, and upper bounds of the norms of the remainders."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    values = (rows / scale).round().clamp(-127, 127)
    rounded = values.double() * scale.double()
    rest = (rows.double() - rounded).norm(dim=1).mul(1 + 1e-6).float()
    return values.to(torch.int8), scale, rounded.norm(dim=1).float(), rest


def median_ms(function: Callable[[], object], rounds: int = 9) -> float:
    """Return the median time over the rounds, after two warm-up rounds."""
    times = []
    for turn in range(rounds + 2):
        started = perf_counter()
        function()
        if turn >= 2:
            times.append(1000 * (perf_counter() - started))
    return statistics.median(times)


def recompute(x_BD: Tensor, weight_HPD: Tensor, left_BH: Tensor) -> float:
    """Compute the float32 products of the remaining heads; return a sum so that nothing is optimised away."""
    total = 0.0
    for head, tokens in enumerate(left_BH.T):
        part = x_BD[tokens.nonzero().squeeze(1)] @ weight_HPD[head].T
        total += float(part[:1].sum())
    return total


def screen(x_BD: Tensor, weight_HPD: Tensor) -> dict[str, object]:
    """Return the share of remaining (token, head) pairs and the times."""
    weight_PD = weight_HPD.flatten(0, 1)
    xq, x_scale, x_norm, x_rest = quantise(x_BD)
    wq, w_scale, _, w_rest = quantise(weight_PD)
    products = torch._int_mm(xq, wq.T).float() * x_scale * w_scale.T
    error = x_norm[:, None] * w_rest + x_rest[:, None] * weight_PD.norm(dim=1)
    exact_BHP = (x_BD @ weight_PD.T).view(-1, H, M + N)
    assert ((products - exact_BHP.flatten(1)).abs() <= error * (1 + 1e-4)).all()
    low, high = ((products + sign * error).relu().view(-1, H, M + N) for sign in (-1, 1))
    low_BH, high_BH = (bound[..., :M].amax(-1) * bound[..., M:].amax(-1) for bound in (low, high))
    threshold = low_BH.topk(K, dim=1).values[:, -1:]
    left_BH = high_BH >= threshold
    heads_BK = kronecker_topk(exact_BHP, M, K).indices_BK // (M * N)
    share = float(left_BH.float().mean())
    return {
        "share_left_over": round(share, 4),
        "heads_left_over_per_token": round(share * H, 1),
        "selection_exact": bool(left_BH.gather(1, heads_BK).all()),
        "float32_product_ms": round(median_ms(lambda: x_BD @ weight_PD.T), 2),
        "int8_product_ms": round(median_ms(lambda: torch._int_mm(xq, wq.T)), 2),
        "recompute_ms": round(median_ms(lambda: recompute(x_BD, weight_HPD, left_BH), 3), 2),
    }


def main() -> None:
    """Measure isotropic activations, and activations that are sums of the dictionary's directions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    weight_HPD = torch.randn(H, M + N, D, generator=generator) / D**0.5
    isotropic_BD = torch.randn(B, D, generator=generator)
    heads_BK = torch.stack([torch.randperm(H, generator=generator)[:K] for _ in range(B)])
    pair_BKD = weight_HPD[heads_BK, 0] + weight_HPD[heads_BK, M]
    aligned_BD = 2 * pair_BKD.sum(1) + 0.1 * isotropic_BD
    rows = [
        {"activations": name, **screen(x_BD, weight_HPD), **provenance_columns(arguments.seed)}
        for name, x_BD in (("isotropic", isotropic_BD), ("sums of 32 pairs", aligned_BD))
    ]
    for row in rows:
        print({key: row[key] for key in list(row)[:7]})
    if arguments.out is not None:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
