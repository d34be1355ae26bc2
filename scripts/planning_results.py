"""Compare the predictions of `kronsae plan` with measured steps and memory; write planning.json and its table.

python scripts/planning_results.py

Nothing is measured here: the measured values are those of ``benchmarks/results``, and the page is docs/planning.md. All
of them are of one machine, of which one efficiency is fitted, to the training steps of `FITTED`.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

from study_parts import END, RESULTS, ROOT, markdown_rows

from kronsae.bench.subjects import Shape, encoders
from kronsae.capacity.devices import DEVICES, GB, Device
from kronsae.capacity.estimate import estimate
from kronsae.capacity.models import find_model
from kronsae.capacity.work import pass_work, seconds_of, step_work
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.data.model import ModelConfig
from kronsae.runs.memory import sae_bytes
from kronsae.runs.recipes import quickstart, shortened
from kronsae.support.files import write_json, write_marked
from kronsae.support.provenance import commit

MEASURED = ROOT / "benchmarks" / "results"
RESULT = RESULTS / "planning.json"
PAGE = ROOT / "docs" / "planning.md"
START = "<!-- results:planning -->"
DEVICE_MARKS = "<!-- devices -->", "<!-- /devices -->"
FITTED = ("step.csv", "grid.csv")
"""Files whose training steps the efficiency is fitted to; the other files test it."""

Row = dict[str, str]


@dataclass(frozen=True)
class Point:
    """A measured value, and the same value predicted: at the peak rates if it is a time."""

    file: str
    what: str
    unit: str
    measured: float
    predicted: float


def rows_of(name: str) -> list[Row]:
    """Return the rows of a result file."""
    with (MEASURED / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sae_of(row: Row, encoder: str) -> SAEConfig:
    """Return the SAE of a row of a benchmark."""
    sizes = {name: int(row[name]) for name in ("d_in", "num_heads", "d_base", "d_extension", "k", "batch")}
    shape = Shape(**sizes)
    return SAEConfig(d_in=shape.d_in, encoder=encoders(shape)[encoder], sparsifier=TopKConfig(k=shape.k))


def machine() -> Device:
    """Return the machine of the measurements, with the highest rates that they show.

    Matrix products: the fastest encoder product. Memory: the optimiser's bytes at the largest dictionary, where they
    are most of what remains of a step after its product.
    """
    rows = [row for name in (*FITTED, "scaling.csv") for row in rows_of(name)]
    products = [row for row in rows if row["subject"] == "encoder_product"]
    flops = max(2 * int(row["batch"]) * int(row["d_in"]) * pre_latents(row) / seconds(row) for row in products)
    largest = {row["subject"]: row for row in rows_of("scaling.csv") if row["d_sae"] == str(2**20)}
    step, product = largest["kronsae"], largest["encoder_product"]
    optimiser = step_of(sae_of(step, "kron"), int(step["batch"]))["optimiser"]
    bandwidth = optimiser.bytes / (seconds(step) - seconds(product))
    return Device(
        name=step["machine"],
        memory_bytes=2**34,
        flops=flops,
        float32_flops=flops,
        bandwidth=bandwidth,
        link_bandwidth=bandwidth,
        source="benchmarks/results",
    )


def pre_latents(row: Row) -> int:
    """Return the outputs of the encoder product of a row."""
    return int(row["num_heads"]) * (int(row["d_base"]) + int(row["d_extension"]))


def seconds(row: Row) -> float:
    """Return the measured time of a row."""
    return float(row["median_ms"]) / 1000


def step_of(shape: SAEConfig, tokens: int, *, clipped: bool = False) -> dict[str, Any]:
    """Return the work of the phases of a step; the benchmarks do not clip gradients."""
    parameters = sae_bytes(shape, tokens, 0, dense_gradients=False).parameters
    return step_work(shape, tokens, parameters, clipped=clipped)


def step_points(device: Device) -> list[Point]:
    """Return the training steps of KronSAE and TopK."""
    found = []
    for name in (*FITTED, "scaling.csv", "sparsifiers.csv"):
        for row in rows_of(name):
            if row.get("sparsifier", "topk") != "topk":
                continue
            encoder = row.get("encoder") or {"kronsae": "kron", "topk": "dense"}.get(row["subject"])
            if encoder is None:
                continue
            shape, batch = sae_of(row, encoder), int(row["batch"])
            sizes = f"F {shape.d_sae:,}, D {shape.d_in:,}, B {batch:,}"
            what = f"{'KronSAE' if encoder == 'kron' else 'TopK'} step, {sizes}"
            work = step_of(shape, batch).values()
            predicted = seconds_of(work, device.float32_flops, device.bandwidth)
            found.append(Point(name, what, "ms", 1000 * seconds(row), 1000 * predicted))
    return found


def run_points(device: Device) -> list[Point]:
    """Return the language model's pass, the steps of a run, and the tokens per second of a whole run."""
    rows = {row["part"]: row for row in rows_of("group_cost.csv")}
    row = rows["model pass"]
    tokens, batch, context = int(row["tokens"]), int(row["batch"]), 256
    model = find_model(ModelConfig(name=row["model"]))
    one = pass_work(model, model.layers_run([row["hook"]]), batch, context).times(tokens / batch)
    rates = device.float32_flops, device.bandwidth
    what = f"language model's pass, {tokens:,} tokens"
    found = [Point("group_cost.csv", what, "ms", float(row["median"]), 1000 * one.seconds(*rates))]
    for member in quickstart().saes:
        shape = member.shape(int(row["d_in"]), row["hook"])
        work = step_of(shape, batch, clipped=True).values()
        predicted = 1000 * tokens / batch * seconds_of(work, *rates)
        what = f"{member.name} training, {tokens:,} tokens"
        found.append(Point("group_cost.csv", what, "ms", float(rows[member.name]["median"]), predicted))
    kept = json.loads((MEASURED / "quickstart_paths.json").read_text(encoding="utf-8"))
    measured = statistics.median(run["in all"] for run in kept["tokens_per_second"]["cpu"])
    run = estimate(shortened(quickstart(), kept["tokens"]), device, 1, efficiency=1.0)
    found.append(
        Point("quickstart_paths.json", "quickstart, time of 1,000 tokens", "ms", 1e6 / measured,
              1e6 / run.tokens_per_second)
    )  # fmt: skip
    return found


def memory_points() -> list[Point]:
    """Return peaks of memory; of processes, the difference to the smallest dictionary's, in which Python takes part."""
    found = []
    rows = [row for row in rows_of("scaling.csv") if row["subject"] == "kronsae"]
    peaks = [(row, process_bytes(row)) for row in rows]
    (first, least), *others = peaks
    for row, predicted in others:
        what = f"training process, F {int(row['d_sae']):,} less F {int(first['d_sae']):,}"
        measured = (int(row["peak_bytes"]) - int(first["peak_bytes"])) / 2**20
        found.append(Point("scaling.csv", what, "MiB", measured, (predicted - least) / 2**20))
    for row in rows_of("memory.csv"):
        needs = sae_bytes(sae_of(row, "kron"), int(row["batch"]), 0, dense_gradients=True)
        what = f"forward and backward, F {int(row['d_sae']):,}"
        extra = (needs.gradients + needs.work) / 2**20
        found.append(Point("memory.csv", what, "MiB", int(row["extra_bytes"]) / 2**20, extra))
    return found


def process_bytes(row: Row) -> int:
    """Return the predicted memory of a process of `kronsae bench scaling`: KronSAE's step, and the product alone."""
    batch = int(row["batch"])
    needs = sae_bytes(sae_of(row, "kron"), batch, 0, dense_gradients=False)
    product = 4 * pre_latents(row) * (int(row["d_in"]) + batch)
    return needs.state + needs.work + product


def compare() -> dict[str, Any]:
    """Return machine, efficiency and all points."""
    device = machine()
    times = [*step_points(device), *run_points(device)]
    fitted = [math.log(point.predicted / point.measured) for point in times if point.file in FITTED]
    efficiency = math.exp(statistics.fmean(fitted))
    points = [_entry(point, efficiency) for point in times]
    points += [_entry(point, 1.0) for point in memory_points()]
    return {
        "machine": device.name,
        "flops": round(device.flops, -9),
        "bandwidth": round(device.bandwidth, -8),
        "efficiency": round(efficiency, 3),
        "points": points,
    }


def _entry(point: Point, efficiency: float) -> dict[str, Any]:
    predicted = point.predicted / efficiency
    return {
        "file": point.file,
        "what": point.what,
        "unit": point.unit,
        "predicted": float(f"{predicted:.4g}"),
        "measured": float(f"{point.measured:.4g}"),
        "ratio": round(predicted / point.measured, 2),
    }


def markdown(kept: dict[str, Any]) -> str:
    """Return the tables of the page."""
    groups: dict[tuple[str, str], list[float]] = {}
    for point in kept["points"]:
        groups.setdefault((point["file"], point["unit"]), []).append(point["ratio"])
    summary = [
        [
            f"{file}, {'memory' if unit == 'MiB' else 'time'}",
            "memory: nothing fitted" if unit == "MiB" else "fitted" if file in FITTED else "predicted",
            f"{len(ratios)}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]
        for (file, unit), ratios in groups.items()
    ]
    points = [
        [point["file"], point["what"], f"{point['predicted']:,.4g} {point['unit']}",
         f"{point['measured']:,.4g} {point['unit']}", f"{point['ratio']:.2f}"]
        for point in kept["points"]
    ]  # fmt: skip
    lines = [
        f"{kept['machine']}: {kept['flops'] / 1e9:,.0f} GFLOP/s (the fastest encoder product) and "
        f"{kept['bandwidth'] / 1e9:.1f} GB/s (the optimiser at F = 2^20); fitted efficiency {kept['efficiency']:.2f}.",
        "",
        *markdown_rows(["file", "role", "points", "predicted / measured, median", "range"], summary),
        "",
        *markdown_rows(["file", "value", "predicted", "measured", "ratio"], points),
        "",
        f"Computed at commit {kept['commit']} from [benchmarks/results](../benchmarks/results), whose files name their "
        "own commits, versions and dates ([JSON](results/planning.json)).",
    ]
    return "\n".join(lines)


def devices() -> str:
    """Return the table of devices."""
    headings = [
        "`--gpu`",
        "memory, GB",
        "bfloat16, TFLOP/s",
        "float32, TFLOP/s",
        "memory, TB/s",
        "link, GB/s",
        "source",
    ]
    rows = [
        [name, f"{device.memory_bytes / GB:g}", f"{device.flops / 1e12:,g}", f"{device.float32_flops / 1e12:g}",
         f"{device.bandwidth / 1e12:g}", f"{device.link_bandwidth / 1e9:g}", device.source]
        for name, device in DEVICES.items()
    ]  # fmt: skip
    return "\n".join(markdown_rows(headings, rows))


def main() -> None:
    """Write the result file and the tables."""
    write_marked(PAGE, *DEVICE_MARKS, devices())
    kept = {"commit": commit(), **compare()}
    write_json(RESULT, kept)
    write_marked(PAGE, START, END, markdown(kept))


if __name__ == "__main__":
    main()
