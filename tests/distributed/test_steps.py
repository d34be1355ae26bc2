"""Test that several processes take the steps of one: any share of the tokens, any part of the dictionary."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.processes import in_processes
from tests.distributed.steps import configs, train, train_in_team

from kronsae.kernels import use

DIVISIBLE = [
    *("topk", "topk-kron", "batch_topk", "batch_topk-kron", "matryoshka", "matryoshka-kron", "transcoder-kron"),
    *("skip_transcoder", "skip_transcoder-kron", "crosscoder", "crosscoder-kron", "clipped"),
    *("pursued", "unrolled"),
]
"""Those that head parallel takes. Not `minimum`: many of its latents have equal values, and one process takes any."""
QUICK = [
    "topk-kron",
    "batch_topk-kron",
    "jumprelu",
    "matryoshka",
    "switch-kron",
    "skip_transcoder",
    "revived",
    "unrolled",
    "own encoder",
]
QUICK_DIVISIBLE = ["topk", "topk-kron", "batch_topk-kron", "matryoshka-kron", "unrolled"]

TOLERANCE = 1e-9
"""After 10 steps in float64, where only the order of sums differs."""
JUMPRELU = 1e-6
"""JumpReLU's coefficient of l0 is kept in float32."""


@cache
def alone(name: str, dtype: torch.dtype) -> dict[str, Any]:
    with use("portable"):
        return train(configs()[name], dtype)


@pytest.mark.parametrize(
    ("processes", "head_parallel", "names"),
    [
        pytest.param(2, 1, QUICK, id="data parallel"),
        pytest.param(4, 2, QUICK_DIVISIBLE, id="both"),
        pytest.param(3, 1, list(configs()), id="data parallel, all", marks=pytest.mark.slow),
        pytest.param(2, 2, DIVISIBLE, id="head parallel, all", marks=pytest.mark.slow),
        pytest.param(4, 2, DIVISIBLE, id="both, all", marks=pytest.mark.slow),
    ],
)
def test_the_steps_are_those_of_one_process(
    processes: int, head_parallel: int, names: list[str], tmp_path: Path
) -> None:
    results = in_processes(processes, train_in_team, tmp_path, names, torch.float64, head_parallel)
    for rank, result in enumerate(results):
        assert not isinstance(result, BaseException), (rank, result, result.__notes__)
        for name in names:
            tolerance = JUMPRELU if "jumprelu" in name else TOLERANCE
            assert_same(result[name], alone(name, torch.float64), tolerance, f"{name}, process {rank}")
    for name in names:  # all processes have the same bits
        for result in results[1:]:
            for key, value in results[0][name]["sae"].items():
                assert torch.equal(value, result[name]["sae"][key]), (name, key)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float, about: str) -> None:
    for step, (one, other) in enumerate(zip(found["metrics"], expected["metrics"], strict=True)):
        for key, value in other.items():
            if value is None or not math.isfinite(value):
                assert one[key] is value or not math.isfinite(one[key]), (about, step, key)
            else:
                assert one[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (about, step, key)
    assert torch.equal(found["unseen"], expected["unseen"]), f"{about}: other latents were active"
    for key, value in expected["sae"].items():
        torch.testing.assert_close(found["sae"][key], value, rtol=tolerance, atol=tolerance, msg=f"{about}: {key}")
