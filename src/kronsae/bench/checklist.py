"""The checklist of `kronsae bench gpu`: what is done on a device, in which order, and within which time.

First every operation is compared with its definition; if one is wrong, nothing is timed. Each item has a time of its
own, after which it starts nothing new and says what it left out. Results are rows, one CSV file per item.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from kronsae import kernels
from kronsae.bench.checks import check_operations
from kronsae.bench.device import Device
from kronsae.bench.measure import make_batches
from kronsae.bench.operations import compare_operations
from kronsae.bench.roofline import Roofline, float32_products, floor_ms, measure_roofline
from kronsae.bench.subjects import REGISTRY, Entry, Shape
from kronsae.bench.tuning import Tried, fastest, first_line, try_blocks
from kronsae.kernels import blocks
from kronsae.support.errors import UserError, nearest
from kronsae.support.files import write_csv
from kronsae.support.provenance import provenance_columns
from kronsae.support.resources import format_bytes

Row = dict[str, Any]
CONTESTANTS = ("encoder_product", "kronsae", "topk", "sparsify", "paper_listing")
GRID_CONTESTANTS = ("kronsae", "topk", "sparsify")
REPEATED = Shape(d_in=96, num_heads=64, d_base=4, d_extension=8, k=16, batch=256)
"""Sizes of the training that must give the same bits twice."""
ENCODERS = {"kronsae": "kron", "topk": "dense"}
"""Contestants with a floor, and their encoder."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of all items.

    Args:
        step: shape of the training step, and of products and tuning.
        grid: shapes of the grid.
        copied: floats of the copy that measures the bandwidth.
        side: rows of the square products that measure the peak.
    """

    step: Shape
    grid: tuple[Shape, ...]
    copied: int
    side: int
    rounds: int = 10


def sizes_for(memory_bytes: int) -> Sizes:
    """Return the largest sizes that fit: those of the aim (D 2,304, F 2^17, B 8,192, k 50) with 60 GiB or more."""
    scale = next((scale for scale, least in ((1, 60), (2, 30), (4, 15)) if memory_bytes >= least * 2**30), 8)
    step = _shape(2304, 2**17 // scale, 8192 // scale)
    grid = tuple(_shape(d_in, d_sae, 4096 // scale) for d_sae in (2**15, 2**17 // scale) for d_in in (768, 2304, 4096))
    return Sizes(step, tuple(dict.fromkeys(grid)), copied=2**28 // scale, side=8192)


def _shape(d_in: int, d_sae: int, batch: int) -> Shape:
    return Shape(d_in=d_in, num_heads=d_sae // 32, d_base=4, d_extension=8, k=50, batch=batch)


@dataclass
class Bench:
    """What the items share: device, sizes, the clock, and what earlier items found.

    Args:
        ends: time of `time.monotonic` at which everything ends.
        item_ends: the same for the item that runs.
        table: file of block sizes that tuning writes.
    """

    device: Device
    sizes: Sizes
    seed: int
    ends: float
    table: Path
    item_ends: float = 0.0
    roofline: Roofline | None = None
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def seconds_left(self) -> float:
        """Return the seconds that the item that runs still has."""
        return min(self.ends, self.item_ends) - monotonic()


@dataclass(frozen=True)
class Item:
    """One item: its name, what it does, its time in seconds at most, and the function that yields its rows."""

    name: str
    about: str
    seconds: int
    run: Callable[[Bench], Iterator[Row]]


class WrongOperation(UserError):
    """An operation is wrong on this device; nothing was timed."""

    exit_status = 1


def _operations(bench: Bench) -> Iterator[Row]:
    for checked in compare_operations(bench.device, bench.seed):
        yield {**asdict(checked), "right": checked.right}
    row: Row = {"operation": "whole SAE", "output": "loss and every gradient", "dtype": "float64", "sizes": ""}
    row |= {"error": 0.0, "tolerance": 1e-8, "right": True}
    try:
        with kernels.use(bench.device.path):
            check_operations(bench.seed, bench.device.place)
    except UserError as error:
        row |= {"output": str(error), "error": float("inf"), "right": False}
    yield row
    for name in ENCODERS:
        yield _repeated(bench, name)


def _repeated(bench: Bench, name: str) -> Row:
    """Train an SAE twice for three steps from the same weights; every bit of the weights must be the same."""
    shape = REPEATED
    ends = []
    with kernels.use(bench.device.path):
        for _ in range(2):
            subject: Any = {entry.name: entry for entry in REGISTRY}[name].build(shape, bench.device.place)
            for batch_BD in make_batches(shape.batch, shape.d_in, bench.seed, bench.device.place)[:3]:
                subject.step(batch_BD)
            ends.append(torch.cat([weight.detach().flatten() for weight in subject.member.sae.parameters()]))
    error = float((ends[0] - ends[1]).abs().max())
    sizes = f"{shape.batch} x {shape.k} x {shape.d_sae} x {shape.d_in}"
    return {
        "operation": f"training of {name}", "output": "the same weights again", "dtype": "float32", "sizes": sizes,
        "error": error, "tolerance": 0.0, "right": error == 0,
    }  # fmt: skip


def _roofline(bench: Bench) -> Iterator[Row]:
    bench.roofline = measure_roofline(bench.device, bench.sizes.copied, bench.sizes.side)
    yield {"quantity": "bandwidth", "value": round(bench.roofline.bytes_per_second / 1e9, 2), "unit": "GB/s"}
    for precision, flops in bench.roofline.flops.items():
        yield {"quantity": f"peak, {precision}", "value": round(flops / 1e12, 3), "unit": "TFLOP/s"}


def _product(bench: Bench) -> Iterator[Row]:
    """The encoder's product in each precision: time, error, and how many of the k chosen latents stay the same."""
    shape, place = bench.sizes.step, bench.device.place
    generator = torch.Generator(place).manual_seed(bench.seed)
    tokens = min(shape.batch, 2048)
    x_BD = torch.randn(tokens, shape.d_in, device=place, generator=generator)
    weight_PD = torch.randn(shape.pre_latents, shape.d_in, device=place, generator=generator) * shape.d_in**-0.5
    rounded = x_BD.bfloat16(), weight_PD.bfloat16()
    few = slice(0, min(64, tokens))
    exact_BP = x_BD[few].double() @ weight_PD.double().T
    exact_rounded_BP = rounded[0][few].double() @ rounded[1].double().T
    flops = 2 * tokens * shape.d_in * shape.pre_latents
    reference_BK = None
    for precision in ("float32", "tf32", "bfloat16, float32 out"):
        is_rounded = precision.startswith("bfloat16")

        def product(is_rounded: bool = is_rounded) -> torch.Tensor:
            return _accumulated(*rounded) if is_rounded else x_BD @ weight_PD.T

        with float32_products(precision == "tf32"):
            timing = bench.device.times(product, bench.sizes.rounds)
            out_BP = product()[few]
        with kernels.use(bench.device.path):
            chosen = kernels.kronecker_topk(out_BP.view(len(out_BP), shape.num_heads, -1), shape.d_base, shape.k)
        chosen_BK = chosen.indices_BK
        reference_BK = chosen_BK if reference_BK is None else reference_BK
        same = (chosen_BK.unsqueeze(2) == reference_BK.unsqueeze(1)).any(2).double().mean()
        # against the same inputs in float64: what the accumulation adds, without the rounding of the inputs
        accumulated = (out_BP.double() - (exact_rounded_BP if is_rounded else exact_BP)).abs().max()
        yield {
            "precision": precision,
            "median_ms": round(timing.median_ms, 4),
            "tflops": round(flops / timing.median_ms / 1e9, 3),
            "error": float((out_BP.double() - exact_BP).abs().max() / exact_BP.abs().max()),
            "error_of_accumulation": float(accumulated / exact_BP.abs().max()),
            "same_choice": round(float(same), 5),
        }


def _accumulated(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left right^T`` of bfloat16 in float32."""
    if left.is_cuda:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return left.float() @ right.float().T


def _tune(bench: Bench) -> Iterator[Row]:
    tried: list[Tried] = []
    for dtype in (torch.float32, torch.bfloat16):
        for one in try_blocks(bench.device, bench.sizes.step, dtype, 5, bench.seconds_left):
            tried.append(one)
            yield {
                **asdict(one.key), **asdict(one.blocks), "median_ms": one.milliseconds, "is_default": one.is_default,
                "problem": one.problem,
            }  # fmt: skip
    if best := fastest(tried):
        blocks.write_table(bench.table, bench.device.name, best)
    if bench.seconds_left() <= 0:
        bench.left_out.append("some block sizes")


def _step(bench: Bench) -> Iterator[Row]:
    yield from _contest(bench, bench.sizes.step, CONTESTANTS, bench.sizes.rounds)


def _grid(bench: Bench) -> Iterator[Row]:
    for shape in bench.sizes.grid:
        if bench.seconds_left() <= 0:
            bench.left_out.append(f"F={shape.d_sae:,} D={shape.d_in:,}")
            continue
        yield from _contest(bench, shape, GRID_CONTESTANTS, max(2, bench.sizes.rounds // 2))


def _contest(bench: Bench, shape: Shape, names: tuple[str, ...], rounds: int) -> Iterator[Row]:
    """Time the contestants one after the other, so that each has the device's memory for itself."""
    entries = {entry.name: entry for entry in REGISTRY}
    own: float | None = None
    for name in names:
        if bench.seconds_left() <= 0:
            bench.left_out.append(f"{name} at F={shape.d_sae:,} D={shape.d_in:,}")
            continue
        row = _one(bench, entries[name], shape, rounds)
        own = row["median_ms"] if name == "kronsae" else own
        row["ratio_to_kronsae"] = None if own is None or row["median_ms"] is None else round(row["median_ms"] / own, 3)
        yield row


def _one(bench: Bench, entry: Entry, shape: Shape, rounds: int) -> Row:
    device, encoder = bench.device, ENCODERS.get(entry.name)
    row: Row = {
        "subject": entry.name, **vars(shape), "d_sae": shape.d_sae,
        **dict.fromkeys(("median_ms", "low_quartile_ms", "high_quartile_ms", "rounds", "floor_ms", "ratio_to_floor")),
        **dict.fromkeys(("peak_bytes", "extra_bytes", "ratio_to_kronsae")), "problem": entry.missing() or "",
    }  # fmt: skip
    if row["problem"]:
        return row
    try:
        timing, held, peak = _timed(bench, entry, shape, rounds)
    except torch.OutOfMemoryError:
        row["problem"] = f"out of memory ({format_bytes(device.memory_bytes)} were free)"
        return row
    except Exception as error:  # one contestant's failure must not cost the others their results
        bench.problems.append(f"{entry.name}: {first_line(error)}")
        row["problem"] = first_line(error)
        return row
    finally:
        gc.collect()
        device.release()
    row |= {"median_ms": round(timing.median_ms, 4), "low_quartile_ms": round(timing.low_ms, 4)}
    row |= {"high_quartile_ms": round(timing.high_ms, 4), "rounds": timing.rounds, "peak_bytes": peak}
    row["extra_bytes"] = None if peak is None or held is None else peak - held
    if encoder is not None and bench.roofline is not None:
        floor = floor_ms(shape, encoder, bench.roofline)
        row |= {"floor_ms": round(floor, 4), "ratio_to_floor": round(timing.median_ms / floor, 3)}
    return row


def _timed(bench: Bench, entry: Entry, shape: Shape, rounds: int) -> Any:
    """Return the timing, the memory held between steps, and the peak."""
    device, turn = bench.device, 0
    with contextlib.redirect_stdout(sys.stderr), kernels.use(device.path), float32_products(tf32=False):
        subject = entry.build(shape, device.place)
        batches = make_batches(shape.batch, shape.d_in, bench.seed, device.place)

        def step() -> None:
            nonlocal turn
            subject.step(batches[turn % len(batches)])
            turn += 1

        step()  # makes the optimiser's moments
        device.wait()
        held = device.held_bytes()
        device.reset_peak()
        return device.times(step, rounds), held, device.peak_bytes()


ITEMS = (
    Item("operations", "compare every operation and gradient with its definition", 100, _operations),
    Item("roofline", "measure memory bandwidth and peak of float32, TF32 and bfloat16 products", 20, _roofline),
    Item("product", "the encoder's product in float32, TF32 and bfloat16 with float32 accumulation", 20, _product),
    Item("tune", "time the block sizes of every kernel, keep the fastest in a table that the kernels read", 130, _tune),
    Item("step", "training step, memory and floor: KronSAE, TopK, sparsify's TopK, the paper's listing", 110, _step),
    Item("grid", "KronSAE, TopK and sparsify's TopK over widths and dictionary sizes", 100, _grid),
)
"""The checklist in order; their times add up to at most `MINUTES`."""
MINUTES = 8.0


@dataclass(frozen=True)
class Outcome:
    """What one item did: its rows, its seconds, what it left out for lack of time, and what failed."""

    item: str
    seconds: float
    rows: list[Row]
    left_out: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def block_table() -> Path:
    """Return the file of block sizes that tuning writes and the kernels read."""
    return blocks.table_path()


def select_items(only: list[str]) -> list[Item]:
    """Return the named items in the checklist's order, with the operations always first; no names: all items.

    Raises:
        UserError: no item has such a name.
    """
    known = [item.name for item in ITEMS]
    for name in only:
        if name not in known:
            raise UserError(f"only must name items among {', '.join(known)}; got '{name}'.{nearest(name, known)}")
    return [item for item in ITEMS if not only or item.name in only or item.name == "operations"]


def run_checklist(
    device: Device,
    sizes: Sizes,
    out: Path,
    only: list[str],
    table: Path | None = None,
    minutes: float = MINUTES,
    seed: int = 0,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the items and write ``<item>.csv`` to ``out`` after each.

    Raises:
        WrongOperation: an operation is wrong; its differences are in ``operations.csv``.
        UserError: a bad name or time.
    """
    items = select_items(only)
    if not 0 < minutes <= 60:
        raise UserError(f"minutes must be above 0 and at most 60; got {minutes:g}.")
    columns = {"device": device.name, **provenance_columns(seed)}
    bench = Bench(device, sizes, seed, monotonic() + 60 * minutes, table or block_table())
    outcomes = []
    for item in items:
        outcome = _run(item, bench)
        outcomes.append(outcome)
        if outcome.rows:
            write_csv(out / f"{item.name}.csv", [{**row, **columns} for row in outcome.rows])
        report(outcome)
        if item.name == "operations":
            _check_right(outcome, out)
    return outcomes


def _run(item: Item, bench: Bench) -> Outcome:
    begun = monotonic()
    bench.item_ends, bench.left_out, bench.problems = begun + item.seconds, [], []
    rows: list[Row] = []
    if bench.seconds_left() <= 0:
        return Outcome(item.name, 0.0, rows, ("all of it",))
    try:
        rows.extend(item.run(bench))
    except Exception as error:  # what was measured before is kept, and the next items get their turn
        bench.problems.append(first_line(error))
    return Outcome(item.name, monotonic() - begun, rows, tuple(bench.left_out), tuple(bench.problems))


def _check_right(outcome: Outcome, out: Path) -> None:
    rows = outcome.rows
    wrong = [row for row in rows if not row["right"]]
    if outcome.problems:
        raise WrongOperation(f"operations must run before they are timed; after {len(rows)}: {outcome.problems[0]}")
    if wrong:
        first = wrong[0]
        raise WrongOperation(
            f"operations must be right before they are timed; {len(wrong)} of {len(rows)} outputs are wrong on this "
            f"device, first {first['output']} of {first['operation']} in {first['dtype']} ({first['sizes']}): error "
            f"{first['error']:.2g}, tolerance {first['tolerance']:.2g}. All are in '{out / 'operations.csv'}'."
        )
