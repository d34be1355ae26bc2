"""Every Triton kernel compiled ahead of time, for devices that are not there. Needs Triton: `make test-triton`."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tests.command_line import Kronsae

from kronsae.bench import compiled
from kronsae.bench.compiled import DTYPES, TARGETS, Compiled, compile_all, launches
from kronsae.bench.subjects import Shape
from kronsae.kernels.blocks import KERNELS, Blocks, Key, default_blocks, power_of_two
from kronsae.support.errors import UserError

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_kernels.csv"
ODD = Shape(d_in=2305, num_heads=37, d_base=3, d_extension=5, k=16, batch=3)
"""No size is a multiple of 16, except k: Triton compiles such launches differently, with narrower loads."""
ONES = Shape(d_in=1, num_heads=1, d_base=1, d_extension=1, k=1, batch=1)
"""Triton makes constants of arguments that are 1, which the interpreter does not."""

needs_compiler = pytest.mark.skipif(compiled.missing() is not None, reason=str(compiled.missing()))


def kept() -> list[dict[str, str]]:
    with RESULT.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_result_holds_every_kernel_target_and_dtype() -> None:
    rows = kept()
    assert {(row["target"], row["kernel"], row["dtype"]) for row in rows} == {
        (target, kernel, str(dtype).removeprefix("torch."))
        for target in TARGETS
        for kernel in KERNELS
        for dtype in DTYPES
    }
    for row in rows:
        assert int(row["spill_bytes"]) == 0
        assert int(row["local_bytes"]) == 0
        assert int(row["shared_bytes"]) <= TARGETS[row["target"]].shared_limit


def test_the_result_is_of_these_kernels() -> None:
    """Runs without Triton: a changed kernel or rule of block sizes needs a new result."""
    remedy = "the kernels have changed: kronsae bench compile --csv benchmarks/results/gpu_kernels.csv"
    for row in kept():
        assert row["source"] == compiled.source_digest(), remedy
        key = Key(row["kernel"], row["dtype"], power_of_two(int(row["width"])))
        assert Blocks(int(row["block"]), int(row["rows"]), int(row["num_warps"])) == default_blocks(key), remedy
        assert "triton 3" in row["versions"]
        assert not row["commit"].endswith("-dirty")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills(target: str, dtype: torch.dtype) -> None:
    found = compile_all(target, dtype)
    assert {one.kernel for one in found} == set(KERNELS)
    for one in found:
        assert one.spill_bytes == 0, one
        assert one.local_bytes == 0, one
        assert one.shared_bytes <= TARGETS[target].shared_limit, one
    name = str(dtype).removeprefix("torch.")
    recorded = [row for row in kept() if (row["target"], row["dtype"]) == (target, name)]
    columns = [field.name for field in fields(Compiled)]
    assert [[str(getattr(one, column)) for column in columns] for one in found] == [
        [row[column] for column in columns] for row in recorded
    ], "the result is not of this compiler: kronsae bench compile --csv benchmarks/results/gpu_kernels.csv"


@needs_compiler
@pytest.mark.parametrize("shape", [ODD, ONES], ids=["odd", "ones"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_sizes_compile_too(target: str, shape: Shape) -> None:
    for one in compile_all(target, torch.float32, shape, wide=5001):
        assert one.spill_bytes == one.local_bytes == 0, one


@needs_compiler
def test_a_spill_is_found() -> None:
    """A tile too large for the registers: the optimiser's row of 16,384 in one program of four warps."""
    from kronsae.kernels import blocks

    with blocks.force({"adamw": blocks.Blocks(16384, 1, 4)}), compiled._compiling_for(TARGETS["sm_90"]):
        [launch] = [one for one in launches(torch.float32) if one.variant == "unit norm, in parts"]
        one: Compiled = compiled._compile(launch, TARGETS["sm_90"], torch.float32)
    assert one.block == 16384
    assert one.spill_bytes > 0
    assert one.local_bytes > 0


@needs_compiler
def test_the_launches_are_those_of_a_step() -> None:
    found = launches(torch.bfloat16)
    assert {one.name for one in found} == set(KERNELS)
    decode = next(one for one in found if one.variant == "bias")
    assert decode.grid == (8192, 5)  # tokens, and tiles of 512 of a row of 2,304
    assert decode.arguments[2].shape == (2**17, 2304)
    assert decode.arguments[2].dtype == torch.bfloat16


@pytest.mark.skipif(compiled.missing() is None, reason="Triton can compile here")
def test_without_triton_it_says_so(kronsae: Kronsae) -> None:
    outcome = kronsae("bench", "compile")
    assert outcome.status == 2
    assert outcome.sentence.startswith("kernels must be compiled by Triton: ")


@needs_compiler
def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"target must be one of sm_80, sm_90, gfx942; got 'sm_9'\. Did you mean"):
        compile_all("sm_9", torch.float32)


def test_what_the_assembler_says_is_read() -> None:
    assembly = ".vgpr_count:     54\n .vgpr_spill_count: 3\n .private_segment_fixed_size: 16\n"
    assert compiled._used_on_amd(assembly) == {"registers": 54, "spill_bytes": 12, "local_bytes": 16}
    with pytest.raises(UserError, match=r"the compiler's report must hold"):
        compiled._used_on_amd("nothing")
