"""Every operation of a kernel path on a device, compared with its definition: outputs, and gradients by name.

The tests of the kernels run on CPU tensors; this runs on a GPU. Inputs are made on the CPU, and the definition is
computed there in float64 from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kronsae import kernels
from kronsae.bench.device import Device
from kronsae.kernels import AdamW, PursuitRounds, RowGradient, reference
from kronsae.kernels.dispatch import choose
from kronsae.kernels.rows import Term

PURSUIT = PursuitRounds((4, 4), (1, 2), start=0.7)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference allowed, relative to the largest value of the definition; sums are in another order."""
SIZES = ((5, 3, 7, 13), (33, 9, 50, 300), (64, 32, 300, 2304))
"""Tokens, entries per token, rows of the matrix, width."""
HEADS = ((7, 3, 2, 3, 4), (33, 50, 4, 8, 32), (9, 5, 32, 32, 50))
"""Tokens, heads, bases, extensions, k."""


@dataclass(frozen=True)
class Checked:
    """One output of one operation: its largest difference, relative to the largest value of the definition."""

    operation: str
    output: str
    dtype: str
    sizes: str
    error: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def compare_operations(device: Device, seed: int = 0) -> Iterator[Checked]:
    """Yield the comparison of every output of every operation, in float32, bfloat16 and float64."""
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for sizes in SIZES:
            found = _sums(device, dtype, sizes, generator) | _gradients(device, dtype, sizes, generator)
            found |= _optimizer(device, dtype, sizes, generator)
            for (operation, output), (got, want) in found.items():
                yield _checked(operation, output, dtype, sizes, got, want)
        for heads in HEADS:
            got, want = _selection(device, dtype, heads, generator)
            yield _checked("kronecker_topk", "values chosen", dtype, heads, got, want)
    for sizes in SIZES:  # in float64 only: rounding decides between candidates of nearly equal worth
        got, want = _pursuit(device, sizes, generator)
        yield _checked("pursue", "codes", torch.float64, sizes, got, want)


Found = dict[tuple[str, str], tuple[Tensor, Tensor]]


def _checked(
    operation: str, output: str, dtype: torch.dtype, sizes: tuple[int, ...], got: Tensor, want: Tensor
) -> Checked:
    difference = (got.detach().cpu().double() - want.detach().double()).abs().max()
    error = float(difference / want.detach().double().abs().max().clamp_min(1e-30))
    # what is chosen is the k largest products, rounded as the dtype rounds them: no sum, no difference
    tolerance = 0.0 if operation == "kronecker_topk" else TOLERANCE[dtype]
    tolerance *= 20 if operation == "pursue" else 1  # a dozen steps, each a sum of the residual
    return Checked(operation, output, str(dtype).removeprefix("torch."), " x ".join(map(str, sizes)), error, tolerance)


def _inputs(dtype: torch.dtype, sizes: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    tokens, entries, height, width = sizes

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    weights_BR = normal(tokens, entries)
    weights_BR[torch.rand(tokens, entries, generator=generator) < 0.2] = 0
    rows_BR = torch.randint(height, (tokens, entries), generator=generator)
    return weights_BR, rows_BR, normal(height, width), normal(tokens, width), normal(width)


def _sums(device: Device, dtype: torch.dtype, sizes: tuple[int, ...], generator: torch.Generator) -> Found:
    given = _inputs(dtype, sizes, generator)
    weights, rows, matrix, x, bias = (tensor.to(device.place) for tensor in given)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    with kernels.use(device.path):
        call = {name: choose(name, matrix) for name in ("weighted_rows", "sampled_products", "gradient_rows")}
        group, norm = choose("group_rows", matrix), choose("squared_norm", matrix)
        grouped: RowGradient = group([Term(weights, rows, x)], len(matrix))
        found = {
            ("weighted_rows", "with bias"): call["weighted_rows"](weights, rows, matrix, bias),
            ("weighted_rows", "without bias"): call["weighted_rows"](weights, rows, matrix),
            ("sampled_products", "products"): call["sampled_products"](x, matrix, rows),
            ("gradient_rows", "rows"): call["gradient_rows"](grouped),
            ("squared_norm", "norm"): norm(grouped),
        }
    wanted = {
        ("weighted_rows", "with bias"): reference.weighted_rows(exact[0], exact[1], exact[2], exact[4]),
        ("weighted_rows", "without bias"): reference.weighted_rows(exact[0], exact[1], exact[2]),
        ("sampled_products", "products"): reference.sampled_products(exact[3], exact[2], exact[1]),
    }
    rows_PD = reference.gradient_rows(reference.group_rows([Term(exact[0], exact[1], exact[3])], len(exact[2])))
    wanted |= {("gradient_rows", "rows"): rows_PD, ("squared_norm", "norm"): rows_PD.square().sum()}
    return {name: (found[name], wanted[name]) for name in found}


def _gradients(device: Device, dtype: torch.dtype, sizes: tuple[int, ...], generator: torch.Generator) -> Found:
    """Compare `decode` and `linear_at` with autograd through dense products."""
    values, rows, matrix, x, bias = _inputs(dtype, sizes, generator)
    bias_P = torch.randn(len(matrix), generator=generator).to(dtype)
    up_BD = torch.randn(len(x), x.shape[1], generator=generator).to(dtype)

    def leaves(place: torch.device | str, of: torch.dtype, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(place, of, copy=True).requires_grad_() for name, tensor in tensors.items()}

    found: Found = {}
    got = leaves(device.place, dtype, values=values, W_dec=matrix, b_dec=bias)
    want = leaves("cpu", torch.float64, values=values, W_dec=matrix, b_dec=bias)
    with kernels.use(device.path):
        out_BD = kernels.decode(got["values"], rows.to(device.place), got["W_dec"], got["b_dec"])
        out_BD.backward(up_BD.to(device.place))
    dense_BF = torch.zeros(len(x), len(matrix), dtype=torch.float64).scatter_add(1, rows, want["values"])
    exact_BD = dense_BF @ want["W_dec"] + want["b_dec"]
    exact_BD.backward(up_BD.double())
    found["decode", "output"] = out_BD, exact_BD
    found |= {("decode", f"gradient of {name}"): (_grad(got[name]), _grad(want[name])) for name in got}

    got = leaves(device.place, dtype, x=x, weight=matrix, bias=bias_P)
    want = leaves("cpu", torch.float64, x=x, weight=matrix, bias=bias_P)
    with kernels.use(device.path):
        kept = kernels.linear_at(got["x"], got["weight"], got["bias"], rows.to(device.place), values.to(device.place))
        kept.backward(values.to(device.place))
    (want["x"] @ want["weight"].T + want["bias"]).gather(1, rows).backward(values.double())
    found |= {("linear_at", f"gradient of {name}"): (_grad(got[name]), _grad(want[name])) for name in got}
    return found


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _optimizer(device: Device, dtype: torch.dtype, sizes: tuple[int, ...], generator: torch.Generator) -> Found:
    weights, rows, matrix, x, _ = _inputs(dtype, sizes, generator)
    moments = torch.randn(matrix.shape, generator=generator).to(dtype), torch.rand(matrix.shape, generator=generator)
    start = {"weight": matrix, "moment": moments[0], "second": moments[1].to(dtype) + 0.1}
    found: Found = {}
    for unit_norm, only_touched in ((False, False), (True, False), (True, True)):
        settings = AdamW(
            lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=7, grad_scale=0.3,
            unit_norm=unit_norm, only_touched=only_touched,
        )  # fmt: skip
        got = {name: tensor.to(device.place, copy=True) for name, tensor in start.items()}
        want = {name: tensor.to(torch.float64, copy=True) for name, tensor in start.items()}
        with kernels.use(device.path):
            term = Term(*(tensor.to(device.place) for tensor in (weights, rows, x)))
            grouped = choose("group_rows", got["weight"])([term], len(matrix))
            kernels.adamw(got["weight"], got["moment"], got["second"], grouped, settings)
        exact = reference.group_rows([Term(weights.double(), rows, x.double())], len(matrix))
        reference.adamw(want["weight"], want["moment"], want["second"], exact, settings)
        what = ", ".join([name for name, on in (("unit norm", unit_norm), ("touched rows", only_touched)) if on])
        found |= {("adamw", f"{name} ({what or 'plain'})"): (got[name], want[name]) for name in got}
    return found


def _selection(
    device: Device, dtype: torch.dtype, sizes: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the products chosen and the k largest, both sorted; which of equal products is chosen has no meaning."""
    tokens, heads, d_base, d_extension, k = sizes
    pre_BHP = torch.randn(tokens, heads, d_base + d_extension, generator=generator).to(dtype)
    with kernels.use(device.path):
        chosen: Any = kernels.kronecker_topk(pre_BHP.to(device.place), d_base, k)
    products_BF = reference.kronecker_products(pre_BHP, d_base).flatten(1)
    got = products_BF.gather(1, chosen.indices_BK.cpu()).sort(dim=1).values
    return got, products_BF.topk(k, dim=1).values.sort(dim=1).values


def _pursuit(device: Device, sizes: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the codes of all latents of a pursuit among candidates, a third of which are padding."""
    tokens, _, height, width = sizes
    target_BD, matrix_FD, values_BF = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((tokens, width), (height, width), (tokens, height))
    )
    latents_BC = torch.rand(tokens, height, generator=generator).argsort(1)[:, : min(height, 40)]
    matrix_FD /= width**0.5
    values_BC = values_BF.add(0.4).relu().gather(1, latents_BC)
    place = device.place
    with kernels.use(device.path):
        far = target_BD.to(place), matrix_FD.to(place), values_BC.to(place), latents_BC.to(place)
        got = kernels.pursue(*far, PURSUIT)
    want = reference.pursue(target_BD, matrix_FD, values_BC, latents_BC, PURSUIT)
    empty_BF = torch.zeros(tokens, height, dtype=torch.float64)
    got_BF = empty_BF.scatter_add(1, got.latents_BK.cpu(), got.values_BK.cpu())
    return got_BF, empty_BF.scatter_add(1, want.latents_BK, want.values_BK)
