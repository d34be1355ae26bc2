"""Benchmarks `step`, `grid`, `sparsifiers`, `scaling` and `memory`: they return frozen results and write no file."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import torch

from kronsae.bench.checks import check_operations
from kronsae.bench.machine import peak_bytes, reset_peak, resident_bytes
from kronsae.bench.measure import Timing, interleaved, interleaved_times, make_batches
from kronsae.bench.subjects import REGISTRY, EncoderProduct, OwnTrainer, Shape, encoders, kronsae, topk
from kronsae.core.objective import objective
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, TopKConfig
from kronsae.kernels import collect_row_gradients
from kronsae.support.errors import UserError, nearest
from kronsae.support.resources import available_memory_bytes

R = TypeVar("R")
CELLS = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
"""(M, N) at a fixed H: with H = 1024, F = 2^12 .. 2^20."""
SPARSIFIER_SIZES = tuple((d_in, d_sae) for d_sae in (2**12, 2**14) for d_in in (256, 768))
"""(D, F) at which sparsifiers are compared."""


@dataclass(frozen=True)
class StepResult:
    """Timings by contestant, and why the other contestants could not be measured."""

    shape: Shape
    timings: dict[str, Timing]
    unavailable: dict[str, str]


def step(shape: Shape, rounds: int = 15, seed: int = 0, only: Sequence[str] = ()) -> StepResult:
    """Time a training step of every contestant at one shape.

    Raises:
        UserError: an operation is wrong, or ``only`` holds an unknown name.
    """
    known = {entry.name: entry for entry in REGISTRY}
    for name in only:
        if name not in known:
            raise UserError(f"only must name contestants among {', '.join(known)}; got '{name}'.{nearest(name, known)}")
    check_operations(seed)
    entries = [entry for entry in REGISTRY if not only or entry.name in only]
    unavailable = {entry.name: reason for entry in entries if (reason := entry.missing()) is not None}
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(sys.stderr):  # other libraries print when imported; stdout is for the figures
        subjects = {entry.name: entry.build(shape) for entry in entries if entry.name not in unavailable}
        timings = interleaved(subjects, shape.batch, shape.d_in, rounds, seed)
    return StepResult(shape, timings, unavailable)


@dataclass(frozen=True)
class GridPoint:
    """TopK and KronSAE at one width and dictionary size; ``skipped`` says why nothing was measured."""

    shape: Shape
    timings: dict[str, Timing]
    skipped: str | None = None


def grid(
    widths: Iterable[int] = (768, 1024, 2048, 4096, 8192),
    sizes: Iterable[int] = (2**15, 2**16, 2**17),
    batch: int = 256,
    rounds: int = 5,
    seed: int = 0,
    memory_bytes: int | None = None,
) -> list[GridPoint]:
    """Time training steps over hidden widths and dictionary sizes (paper, fig. 8), M = 4 and N = 8.

    A point whose weights and moments need more than ``memory_bytes`` is skipped. None: two fifths of the free memory,
    because building the weights briefly needs as much again.
    """
    check_operations(seed)
    if memory_bytes is None:
        memory_bytes = (available_memory_bytes() or 8 * 2**30) * 2 // 5
    points = []
    for d_sae in sizes:
        for d_in in widths:
            shape = Shape(d_in=d_in, num_heads=d_sae // 32, d_base=4, d_extension=8, k=50, batch=batch)
            need = 4 * 3 * d_in * (3 * d_sae + shape.pre_latents)
            if need > memory_bytes:
                reason = f"needs {need / 2**30:.0f} GiB of {memory_bytes / 2**30:.0f}"
                points.append(GridPoint(shape, {}, reason))
                continue
            subjects = {"encoder_product": EncoderProduct(shape), "kronsae": kronsae(shape), "topk": topk(shape)}
            points.append(GridPoint(shape, interleaved(subjects, batch, d_in, rounds, seed)))
            del subjects
            gc.collect()
    return points


@dataclass(frozen=True)
class SparsifierPoint:
    """Training step of one encoder with one sparsifier.

    Args:
        ratio: to the step of the same encoder with TopK, round by round (a `Timing` of ratios, not milliseconds).
        l0: active latents per token after the timing.
        width: entries per token in the codes: the largest number of any token; for JumpReLU with latents near their
            thresholds.
    """

    shape: Shape
    encoder: str
    sparsifier: str
    timing: Timing
    ratio: Timing
    l0: float
    width: int


def sparsifiers(
    sizes: Iterable[tuple[int, int]], k: int = 32, batch: int = 1024, rounds: int = 15, seed: int = 0
) -> list[SparsifierPoint]:
    """Time TopK, BatchTopK and JumpReLU at one l0, dense and Kronecker (M = 2, N = 4); each (D, F) is interleaved."""
    check_operations(seed)
    points = []
    for d_in, d_sae in sizes:
        shape = Shape(d_in=d_in, num_heads=d_sae // 8, d_base=2, d_extension=4, k=k, batch=batch)
        trainers = {
            f"{encoder} {config.kind}": OwnTrainer(shape, of_shape, config(k=k))
            for encoder, of_shape in encoders(shape).items()
            for config in (TopKConfig, BatchTopKConfig, JumpReLUConfig)
        }
        times = interleaved_times(trainers, batch, d_in, rounds, seed)
        x_BD = make_batches(batch, d_in, seed)[0]
        for name, trainer in trainers.items():
            encoder, sparsifier = name.split()
            sae = trainer.member.sae
            codes = sae.sparsifier.choose_in_training(sae.encoder(x_BD)).codes
            pairs = zip(times[name], times[f"{encoder} {TopKConfig.kind}"], strict=True)
            ratio = Timing.of([own / topk for own, topk in pairs])
            places = float(codes.l0()), codes.values.shape[-1]
            points.append(SparsifierPoint(shape, encoder, sparsifier, Timing.of(times[name]), ratio, *places))
        del trainers
        gc.collect()
    return points


@dataclass(frozen=True)
class ScalingPoint:
    """KronSAE at one dictionary size, measured in its own process."""

    shape: Shape
    timings: dict[str, Timing]
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second."""
        return 1000 * self.shape.batch / self.timings["kronsae"].median_ms


def scaling(
    d_in: int = 768,
    num_heads: int = 1024,
    k: int = 32,
    batch: int = 1024,
    rounds: int = 5,
    seed: int = 0,
    cells: Sequence[tuple[int, int]] = CELLS,
) -> list[ScalingPoint]:
    """Measure step time and peak memory of KronSAE while F grows 256-fold at a fixed number of heads."""
    check_operations(seed)
    shapes = [
        Shape(d_in=d_in, num_heads=num_heads, d_base=base, d_extension=extension, k=k, batch=batch)
        for base, extension in cells
    ]
    return [_in_fresh_process(_scaling_point, shape, rounds, seed) for shape in shapes]


def _scaling_point(shape: Shape, rounds: int, seed: int) -> ScalingPoint:
    subjects = {"encoder_product": EncoderProduct(shape), "kronsae": kronsae(shape)}
    timings = interleaved(subjects, shape.batch, shape.d_in, rounds, seed)
    return ScalingPoint(shape, timings, peak_bytes() or 0)


@dataclass(frozen=True)
class MemoryResult:
    """Peak memory that forward and backward add to weights and batch."""

    shape: Shape
    extra_bytes: int

    @property
    def pre_latent_bytes(self) -> int:
        """B * H * (M + N) * 4: all pre-latents of the batch in float32, the unit of comparison."""
        return 4 * self.shape.batch * self.shape.pre_latents

    @property
    def ratio(self) -> float:
        """Extra memory in units of all pre-latents."""
        return self.extra_bytes / self.pre_latent_bytes


def memory(shape: Shape, seed: int = 0) -> MemoryResult:
    """Measure the peak extra memory of one forward and backward pass, with dense gradients, in a new process.

    Raises:
        UserError: the system does not report a process's peak memory.
    """
    check_operations(seed)
    if peak_bytes() is None:
        raise UserError("memory must be measured on Linux; this system does not report the peak memory of a process.")
    return MemoryResult(shape, _in_fresh_process(_extra_bytes, shape, seed))


def _extra_bytes(shape: Shape, seed: int) -> int:
    small = Shape(d_in=shape.d_in, num_heads=4, d_base=shape.d_base, d_extension=shape.d_extension, k=4, batch=8)
    _forward_backward(small, seed)  # loads compiled code and libraries before the measurement
    return _forward_backward(shape, seed)


def _forward_backward(shape: Shape, seed: int) -> int:
    trainer = kronsae(shape)
    assert isinstance(trainer, OwnTrainer)
    x_BD = make_batches(shape.batch, shape.d_in, seed)[0]
    gc.collect()
    reset_peak()
    before = resident_bytes() or 0
    with collect_row_gradients() as rows:
        loss = objective(trainer.member.sae, x_BD).loss
    loss.backward()
    rows.materialize()
    return (peak_bytes() or 0) - before


def _in_fresh_process(function: Callable[..., R], *arguments: object) -> R:
    """Run a function in a new interpreter, so that its memory is measured alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(f"sizes must fit the machine; the process measuring {arguments[0]} was killed.") from error
