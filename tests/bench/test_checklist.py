"""The checklist of `kronsae bench gpu` on a stand-in for a device: the CPU and tiny sizes.

The kernels are the portable ones; in Triton's interpreter (`make test-triton`) they are those of the GPU.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import Kronsae
from torch import Tensor

from kronsae.bench import checklist, device, operations, roofline, tuning
from kronsae.bench.checklist import Item, Sizes, run_checklist
from kronsae.bench.device import Device
from kronsae.bench.roofline import Roofline
from kronsae.bench.subjects import Entry, Shape
from kronsae.kernels import blocks
from kronsae.kernels.blocks import Blocks, Key
from kronsae.kernels.dispatch import refuse
from kronsae.support.errors import UserError

CPU = torch.device("cpu")
PATH = "portable" if refuse("gpu", "adamw", CPU, torch.float32) else "gpu"
STAND_IN = Device("stand-in", CPU, PATH, 2**30)
SMALL = Shape(d_in=16, num_heads=8, d_base=2, d_extension=3, k=4, batch=32)
SIZES = Sizes(SMALL, (SMALL,), copied=1024, side=16, rounds=2)


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(operations, "SIZES", operations.SIZES[:1])
    monkeypatch.setattr(operations, "HEADS", operations.HEADS[:1])
    monkeypatch.setattr(checklist, "REPEATED", SMALL)
    monkeypatch.setattr(tuning, "candidates", lambda key: blocks.candidates(key)[:2])
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "cache"))
    yield
    blocks._kept.cache_clear()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_whole_checklist_writes_a_file_per_item(tmp_path: Path) -> None:
    outcomes = run_checklist(STAND_IN, SIZES, tmp_path, [])
    assert [one.item for one in outcomes] == [item.name for item in checklist.ITEMS]
    assert all(one.problems == () and one.left_out == () for one in outcomes)
    files = {item.name: read(tmp_path / f"{item.name}.csv") for item in checklist.ITEMS}
    for rows in files.values():
        assert all(row["device"] == "stand-in" and row["commit"] and row["date"] for row in rows)
    assert {row["right"] for row in files["operations"]} == {"True"}
    names = {row["operation"] for row in files["operations"]}
    assert names == {
        "weighted_rows", "sampled_products", "gradient_rows", "squared_norm", "decode", "linear_at", "adamw",
        "kronecker_topk", "pursue", "whole SAE", "training of kronsae", "training of topk",
    }  # fmt: skip
    gradients = {row["output"] for row in files["operations"] if row["operation"] in ("decode", "linear_at")}
    assert {f"gradient of {name}" for name in ("values", "W_dec", "b_dec", "x", "weight", "bias")} <= gradients
    assert [row["quantity"] for row in files["roofline"]] == [
        "bandwidth", "peak, float32", "peak, tf32", "peak, bfloat16",
    ]  # fmt: skip
    by = {row["subject"]: row for row in files["step"]}
    assert list(by) == list(checklist.CONTESTANTS)
    for name in ("kronsae", "topk"):
        assert float(by[name]["ratio_to_floor"]) == pytest.approx(
            float(by[name]["median_ms"]) / float(by[name]["floor_ms"]), rel=0.05
        )
    assert float(by["kronsae"]["ratio_to_kronsae"]) == 1
    assert by["paper_listing"]["floor_ms"] == ""
    product = {row["precision"]: row for row in files["product"]}
    assert float(product["float32"]["same_choice"]) == 1
    assert float(product["float32"]["error"]) < 1e-5 < float(product["bfloat16, float32 out"]["error"]) < 2e-2
    assert float(product["bfloat16, float32 out"]["error_of_accumulation"]) < 1e-5
    assert {row["kernel"] for row in files["tune"]} == set(blocks.KERNELS)
    table = blocks.read_table(tmp_path / "cache" / "blocks.json")
    assert {key.kernel for key in table["stand-in"]} == set(blocks.KERNELS)


def test_nothing_is_timed_when_an_operation_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"kronsae.kernels.{PATH}")
    right = module.sampled_products
    monkeypatch.setattr(tuning, "choose", None)

    def wrong(x_BD: Tensor, matrix_PD: Tensor, rows_BR: Tensor) -> Tensor:
        products_BR: Tensor = right(x_BD, matrix_PD, rows_BR)
        return products_BR * 1.001

    from kronsae.kernels import dispatch

    monkeypatch.setattr(module, "sampled_products", wrong)
    dispatch._load_function.cache_clear()
    try:
        with pytest.raises(checklist.WrongOperation, match="outputs are wrong on this device, first products of sampl"):
            run_checklist(STAND_IN, SIZES, tmp_path, ["step"])
    finally:
        monkeypatch.undo()
        dispatch._load_function.cache_clear()
    assert any(row["right"] == "False" for row in read(tmp_path / "operations.csv"))
    assert not (tmp_path / "step.csv").exists()


def test_a_difference_that_is_not_a_number_is_wrong() -> None:
    def one(error: float) -> operations.Checked:
        return operations.Checked("decode", "output", "float32", "", error, 1e-5)

    assert one(1e-6).right
    assert not one(1e-4).right
    assert not one(float("nan")).right


def items(monkeypatch: pytest.MonkeyPatch, **runs: Any) -> None:
    rest = [Item(name, "", 60, run) for name, run in runs.items()]
    monkeypatch.setattr(checklist, "ITEMS", (Item("operations", "", 60, lambda bench: iter([{"right": True}])), *rest))


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(checklist, "monotonic", lambda: clock[0])

    def slow(bench: checklist.Bench) -> Iterator[checklist.Row]:
        while bench.seconds_left() > 0:
            clock[0] += 25
            yield {"at": clock[0]}
        bench.left_out.append("the rest")

    items(monkeypatch, first=slow, second=slow, third=slow)
    outcomes = run_checklist(STAND_IN, SIZES, tmp_path, [], minutes=2)
    assert [len(one.rows) for one in outcomes] == [1, 3, 2, 0]  # 60 s each, 120 s together
    assert [one.left_out for one in outcomes] == [(), ("the rest",), ("the rest",), ("all of it",)]
    assert outcomes[3].seconds == 0


def test_a_failed_item_keeps_its_rows_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: checklist.Bench) -> Iterator[checklist.Row]:
        yield {"number": 1}
        raise RuntimeError("an illegal memory access\nwas encountered")

    items(monkeypatch, broken=broken, whole=lambda bench: iter([{"number": 2}]))
    outcomes = run_checklist(STAND_IN, SIZES, tmp_path, [])
    assert outcomes[1].problems == ("RuntimeError: an illegal memory access",)
    assert [row["number"] for row in read(tmp_path / "broken.csv")] == ["1"]
    assert [row["number"] for row in read(tmp_path / "whole.csv")] == ["2"]


def test_a_contestant_that_fails_or_lacks_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(error: Exception) -> Any:
        def build(shape: Shape, place: torch.device) -> None:
            raise error

        return build

    entries = (
        Entry("kronsae", fail(torch.OutOfMemoryError("too much"))),
        Entry("topk", fail(ValueError("no such thing"))),
        Entry("sparsify", fail(ValueError()), ("a_package_nobody_has", "eai-sparsify")),
    )
    monkeypatch.setattr(checklist, "REGISTRY", entries)
    grid = next(item.run for item in checklist.ITEMS if item.name == "grid")
    items(monkeypatch, grid=grid)
    outcomes = run_checklist(STAND_IN, SIZES, tmp_path, [])
    assert [row["problem"] for row in outcomes[1].rows] == [
        "out of memory (1 GB were free)",
        "ValueError: no such thing",
        "eai-sparsify is not installed (pip install 'kronsae[bench]')",
    ]
    assert outcomes[1].problems == ("topk: ValueError: no such thing",)


def test_the_floor_adds_up_what_limits_each_phase() -> None:
    shape = Shape(d_in=4, num_heads=2, d_base=1, d_extension=1, k=1, batch=8)
    found = {phase.name: phase for phase in roofline.phases(shape, "kron")}
    assert found["encoder product"].flops == 2 * 8 * 4 * 4
    assert found["encoder product"].moved_bytes == 4 * (8 * 4 + 4 * 4 + 8 * 4)
    assert found["decoding"].moved_bytes == 4 * (8 * 1 * 4 + 8 * 4)
    moved = sum(phase.moved_bytes for phase in found.values())
    slow_memory = Roofline(1.0, {"float32": 1e9})
    assert roofline.floor_ms(shape, "kron", slow_memory) == pytest.approx(1000 * moved)
    slow_product = Roofline(1e12, {"float32": 1.0})
    flops = sum(phase.flops for phase in found.values())
    assert roofline.floor_ms(shape, "kron", slow_product) == pytest.approx(1000 * flops, rel=1e-6)


def test_the_fastest_must_gain_more_than_noise() -> None:
    key = Key("adamw", "float32", 1024)

    def tried(block: int, milliseconds: float | None, is_default: bool = False) -> tuning.Tried:
        return tuning.Tried(key, Blocks(block), milliseconds, is_default)

    assert tuning.fastest([tried(1024, 1.0, True), tried(512, 0.98), tried(256, None)]) == {key: Blocks(1024)}
    assert tuning.fastest([tried(1024, 1.0, True), tried(512, 0.9), tried(256, 0.95)]) == {key: Blocks(512)}
    assert tuning.fastest([tried(256, None, True)]) == {}


def test_the_sizes_fit_the_device() -> None:
    full = checklist.sizes_for(80 * 2**30)
    assert (full.step.d_in, full.step.d_sae, full.step.batch, full.step.k) == (2304, 2**17, 8192, 50)
    assert checklist.sizes_for(8 * 2**30).step.d_sae == 2**14
    assert sum(item.seconds for item in checklist.ITEMS) <= 60 * checklist.MINUTES


def test_dry_run_prints_the_items_and_does_nothing(kronsae: Kronsae, tmp_path: Path) -> None:
    outcome = kronsae("bench", "gpu", "--dry-run", "--out", tmp_path / "out")
    assert outcome.status == 0
    for item in checklist.ITEMS:
        assert f"{item.name:11s} {item.seconds:4d} s at most" in outcome.out
    assert not (tmp_path / "out").exists()
    planned = kronsae("bench", "gpu", "--dry-run", "--only", "step", "--json").json
    assert [item["item"] for item in planned["items"]] == ["operations", "step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(kronsae: Kronsae, tmp_path: Path) -> None:
    outcome = kronsae("bench", "gpu", "--out", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.sentence.startswith("device must be a GPU that PyTorch can use; there is none here. Run this on")
    assert not (tmp_path / "out").exists()


def test_an_unknown_item_and_a_wrong_time_are_refused(kronsae: Kronsae, tmp_path: Path) -> None:
    outcome = kronsae("bench", "gpu", "--only", "stepp", "--dry-run")
    assert outcome.status == 2
    assert outcome.sentence.startswith("only must name items among operations, roofline, product, tune, step, grid")
    assert outcome.sentence.endswith("got 'stepp'. Did you mean 'step'?")
    with pytest.raises(UserError, match="minutes must be above 0 and at most 60; got 0"):
        run_checklist(STAND_IN, SIZES, tmp_path, [], minutes=0)


def test_the_command_reports_and_fails_if_an_item_failed(
    kronsae: Kronsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kronsae.cli import bench

    monkeypatch.setattr(bench, "find_gpu", lambda: STAND_IN)
    monkeypatch.setattr(checklist, "sizes_for", lambda memory_bytes: SIZES)
    step = next(item.run for item in checklist.ITEMS if item.name == "step")
    items(monkeypatch, step=step)
    done = kronsae("bench", "gpu", "--out", tmp_path, "--json")
    assert done.status == 0, done.err
    assert [row["subject"] for row in done.json["results"]["step"]] == list(checklist.CONTESTANTS)
    assert "results go to" in done.err
    assert "What now?" in done.err

    def broken(bench: checklist.Bench) -> list[checklist.Row]:
        raise RuntimeError("no")

    items(monkeypatch, broken=broken)
    failed = kronsae("bench", "gpu", "--out", tmp_path)
    assert failed.status == 1
    assert "failed: RuntimeError: no" in failed.err


def test_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Triton, which is not installed\. Install it: pip install 'kronsae\[gpu\]'"):
        device.find_gpu()
