"""Measured block sizes: every candidate of every kernel of the GPU path, timed on the device at one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kronsae import kernels
from kronsae.bench.device import Device
from kronsae.bench.subjects import Shape
from kronsae.kernels.blocks import Blocks, Key, candidates, force, power_of_two
from kronsae.kernels.dispatch import choose
from kronsae.kernels.rows import AdamW, Term

MUST_GAIN = 0.97  # below this share of the default's time; smaller gains are within the noise


@dataclass(frozen=True)
class Tried:
    """One candidate's median duration; None: it could not be launched, and ``problem`` says why."""

    key: Key
    blocks: Blocks
    milliseconds: float | None
    is_default: bool
    problem: str = ""


def try_blocks(
    device: Device, shape: Shape, dtype: torch.dtype, rounds: int = 5, seconds_left: Callable[[], float] | None = None
) -> Iterator[Tried]:
    """Yield every candidate's time, kernel after kernel; stop when no time is left.

    The optimiser's kernel changes the weights that it is timed on; they are not used for anything else.
    """
    with kernels.use(device.path):
        for kernel, call in calls(device, shape, dtype).items():
            key = Key(kernel, str(dtype).removeprefix("torch."), power_of_two(_width(kernel, shape)))
            for number, blocks in enumerate(candidates(key)):
                if seconds_left is not None and seconds_left() <= 0:
                    return
                with force({kernel: blocks}):
                    try:
                        found, problem = device.times(call, rounds).median_ms, ""
                    except Exception as error:  # such as too much shared memory; the next candidate gets its turn
                        found, problem = None, first_line(error)
                yield Tried(key, blocks, found, number == 0, problem)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def fastest(tried: list[Tried]) -> dict[Key, Blocks]:
    """Return the fastest candidate of each kernel that was measured; the default unless another takes 3% less."""
    best: dict[Key, tuple[float, Blocks]] = {}
    for one in tried:
        if one.milliseconds is not None:
            cost = one.milliseconds * (MUST_GAIN if one.is_default else 1.0)
            if one.key not in best or cost < best[one.key][0]:
                best[one.key] = cost, one.blocks
    return {key: blocks for key, (_, blocks) in best.items()}


def _width(kernel: str, shape: Shape) -> int:
    if kernel == "head_bounds":
        return shape.d_base + shape.d_extension
    if kernel == "expand":
        return min(shape.k, shape.num_heads) * shape.d_base * shape.d_extension
    return shape.d_in


def calls(device: Device, shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return a call for each kernel, with the sizes of a training step, most of whose time it takes first."""
    generator = torch.Generator(device.place).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device.place, generator=generator)

    x_BD, weight_FD = normal(shape.batch, shape.d_in), normal(shape.d_sae, shape.d_in)
    moments = torch.zeros_like(weight_FD), torch.ones_like(weight_FD)
    values_BK = normal(shape.batch, shape.k).abs() + 0.1
    rows_BK = torch.randint(shape.d_sae, (shape.batch, shape.k), device=device.place, generator=generator)
    pre_BHP = normal(min(shape.batch, 2048), shape.num_heads, shape.d_base + shape.d_extension)
    settings = AdamW(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=10, unit_norm=True)
    run = {name: choose(name, weight_FD) for name in ("adamw", "weighted_rows", "sampled_products", "kronecker_topk")}
    run |= {name: choose(name, weight_FD) for name in ("gradient_rows", "squared_norm")}
    gradient = choose("group_rows", weight_FD)([Term(values_BK, rows_BK, x_BD)], shape.d_sae)

    def select() -> object:
        return run["kronecker_topk"](pre_BHP, shape.d_base, shape.k)

    return {
        "adamw": lambda: run["adamw"](weight_FD, *moments, gradient, settings),
        "weighted_rows": lambda: run["weighted_rows"](values_BK, rows_BK, weight_FD),
        "sampled_products": lambda: run["sampled_products"](x_BD, weight_FD, rows_BK),
        "row_squares": lambda: run["squared_norm"](gradient),
        "gradient_rows": lambda: run["gradient_rows"](gradient),
        "head_bounds": select,
        "expand": select,
    }
