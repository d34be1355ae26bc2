"""What a device can do at best, measured, and the least time that a training step needs on it.

Each phase of a step takes at least ``max(bytes / bandwidth, FLOPs / peak)``; the floor is the sum over phases, because
one phase needs the results of the one before. Bytes are those that a phase must read and write: a weight row that a
token gathers counts for each token, and activations that the optimiser gathers count once, since they stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from kronsae.bench.device import Device
from kronsae.bench.subjects import Shape


@dataclass(frozen=True)
class Roofline:
    """Measured rates of one device.

    Args:
        bytes_per_second: read plus written, of a copy that does not fit into any cache.
        flops: FLOPs per second of a square product by precision: float32, tf32, bfloat16.
    """

    bytes_per_second: float
    flops: dict[str, float]

    def seconds(self, moved: float, flops: float = 0.0, precision: str = "float32") -> float:
        """Return the least time for moving bytes and computing."""
        return max(moved / self.bytes_per_second, flops / self.flops[precision])


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Compute products of float32 inside the block with or without TF32 (10 bits of mantissa)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_roofline(device: Device, elements: int, side: int) -> Roofline:
    """Measure a copy of ``elements`` floats and square products of ``side`` rows."""
    source, sink = (torch.zeros(elements, device=device.place) for _ in range(2))
    copy = device.seconds(lambda: sink.copy_(source), calls=5)
    del source, sink
    flops = {}
    for precision in ("float32", "tf32", "bfloat16"):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        left, right = (torch.randn(side, side, dtype=dtype, device=device.place) for _ in range(2))
        with float32_products(precision == "tf32"):
            flops[precision] = 2 * side**3 / device.seconds(partial(torch.mm, left, right), calls=5)
    return Roofline(8 * elements / copy, flops)


@dataclass(frozen=True)
class Phase:
    """One phase of a step: bytes that it must move and FLOPs that it must compute."""

    name: str
    moved_bytes: int
    flops: int = 0


def phases(shape: Shape, encoder: str) -> list[Phase]:
    """Return the phases of a training step in float32 with a ``kron`` or ``dense`` encoder, TopK and AdamW.

    With P encoder rows (H (M + N), or F for dense) and R of them per token (2 K, or K): the product reads x and W_enc
    and writes B P outputs, which the selection reads; decoding reads B K rows of W_dec, and so does the gradient of the
    values; the optimiser reads and writes each weight and its two moments and reads its inputs and B R or B K entries.
    """
    tokens, d_in, d_sae, k = shape.batch, shape.d_in, shape.d_sae, shape.k
    rows = shape.pre_latents if encoder == "kron" else d_sae
    per_token = 2 * k if encoder == "kron" else k
    entry = 12  # a token of 8 bytes and a weight of 4
    inputs = 4 * tokens * d_in
    return [
        Phase("encoder product", 4 * (tokens * d_in + rows * d_in + tokens * rows), 2 * tokens * d_in * rows),
        Phase("selection", 4 * tokens * rows),
        Phase("decoding", 4 * (tokens * k * d_in + tokens * d_in), 2 * tokens * k * d_in),
        Phase("gradient of the values", 4 * (tokens * k * d_in + tokens * d_in), 2 * tokens * k * d_in),
        Phase("optimiser, decoder", 24 * d_sae * d_in + inputs + entry * tokens * k),
        Phase("optimiser, encoder", 24 * rows * d_in + inputs + entry * tokens * per_token),
    ]


def floor_ms(shape: Shape, encoder: str, roofline: Roofline) -> float:
    """Return the least milliseconds of a training step, with products in float32 without TF32."""
    return 1000 * sum(roofline.seconds(phase.moved_bytes, phase.flops) for phase in phases(shape, encoder))
