"""Test whole runs of several processes: the curves and SAEs of one process, and resuming with other numbers of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.processes import in_processes
from tests.distributed.runs import batches_in_team, harvested, run_in_team
from tests.stopping import go
from tests.tiny_runs import listing, rows, weights

from kronsae.kernels import use
from kronsae.runs.config import RunConfig
from kronsae.runs.pipeline import Source
from kronsae.runs.run import Run, open_run

LOSS, WEIGHTS = 1e-3, 5e-3
"""Largest difference after 20 steps in float32: relative of losses, absolute of weights, whose rows have norm 1."""


@pytest.fixture(scope="module")
def whole(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process, on the kernels of the processes."""
    with use("portable"):
        return go(finished_run.config, tmp_path_factory.mktemp("whole") / "r")


def succeeded(results: list[Any]) -> list[Any]:
    for rank, result in enumerate(results):
        assert not isinstance(result, BaseException), (rank, result, result.__notes__)
    return results


def assert_close(found: Run, expected: Run) -> None:
    of_one, of_several = rows(expected), rows(found)
    assert [(row["step"], row["sae"]) for row in of_several] == [(row["step"], row["sae"]) for row in of_one]
    for row, other in zip(of_several, of_one, strict=True):
        for key, value in other.items():
            if isinstance(value, float) and math.isfinite(value):
                assert row[key] == pytest.approx(value, rel=LOSS, abs=LOSS), (row["step"], row["sae"], key)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], weight, rtol=0, atol=WEIGHTS * float(weight.abs().max()))


@pytest.mark.parametrize(("stored", "processes", "head_parallel"), [(False, 4, 2), (True, 3, 1)])
def test_the_batches_are_those_of_one_process(
    stored: bool, processes: int, head_parallel: int, config: RunConfig, tmp_path: Path
) -> None:
    """Live or harvested activations: each process has a part, and together they have the same rows, bit for bit."""
    config = harvested(config, tmp_path / "stored") if stored else config
    stream = Source(config).batches(None)
    expected = [batch["layers.2"] for (batch, _), _ in zip(stream, range(8), strict=False)]
    results = succeeded(in_processes(processes, batches_in_team, tmp_path, config, head_parallel, 8))
    for step, batch_BD in enumerate(expected):
        joined = torch.empty_like(batch_BD)
        for rank, result in enumerate(results):
            rows_ND, holder_B = result[step]
            leader = results[rank - rank % head_parallel][step][0]
            assert torch.equal(rows_ND, leader)  # a row of the mesh has one share
            joined[holder_B == rank // head_parallel] = rows_ND
        assert torch.equal(joined, batch_BD)


def test_resumed_by_two_and_by_one(whole: Run, config: RunConfig, tmp_path: Path) -> None:
    """Four processes (two shares, two parts of each dictionary) stop after 9 steps, two after 14; one ends the run."""
    out = tmp_path / "r"
    said = succeeded(in_processes(4, run_in_team, tmp_path / "4", config, out, 2, 9))
    assert [bool(lines) for lines in said] == [True, False, False, False]
    assert said[0][-1] == (
        f"stopped after 576 of 1,280 tokens; a checkpoint is saved in {out}. Run the same command again to resume."
    )
    steps = (5, 9)  # the last two
    inside = [f"step-{step:08d}{name}" for step in steps for name in ("", "/layout.json", "/progress.json")]
    assert [name for name in listing(out / "checkpoint") if "state-" not in name] == inside
    said = succeeded(in_processes(2, run_in_team, tmp_path / "2", config, out, 2, 14))
    assert "Resuming after 576 of 1,280 tokens." in said[0]
    with use("portable"):
        assert_close(go(config, out), whole)
    assert listing(out) == listing(whole.folder)


def test_a_run_of_one_is_resumed_by_three(
    whole: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.stopping import ctrl_c, interrupt_at

    from kronsae.runs.run import Interrupted

    with monkeypatch.context() as patch, use("portable"):
        interrupt_at(patch, 6, ctrl_c)
        with pytest.raises(Interrupted):
            go(config, tmp_path / "r")
    succeeded(in_processes(3, run_in_team, tmp_path / "3", config, tmp_path / "r", 1, None))
    assert_close(open_run(tmp_path / "r"), whole)
