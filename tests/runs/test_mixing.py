"""Shuffling in a run: window pool, buffer and harvested activations; run folders of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stopping import ctrl_c, go, interrupt_at
from tests.tiny_runs import STEPS, assert_same_run

from kronsae.runs.config import RunConfig
from kronsae.runs.harvest import harvest, with_activations
from kronsae.runs.pipeline import Source
from kronsae.runs.planning import make_plan, plan_run
from kronsae.runs.run import Interrupted, Run
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"window_pool_tokens": 127},
            "window_pool_tokens must be 0 or at least model_batch * context_length; got 127 with 128. Enlarge the "
            "pool, or give 0 to read the windows in the order of the text.",
        ),
        ({"window_pool_tokens": -1}, "window_pool_tokens must be a whole number above 0; got -1."),
    ],
)
def test_the_pool_is_checked(changes: dict[str, Any], message: str, config: RunConfig) -> None:
    with pytest.raises(UserError) as caught:
        replace(config, **changes)
    assert str(caught.value) == message


def test_training_draws_windows_from_the_pool_and_everything_else_reads_the_text_in_its_order(
    config: RunConfig,
) -> None:
    def documents(config: RunConfig, **options: Any) -> list[str]:
        make = Source(config).tokens(held_out=False, **options)
        return [document for batch, _ in islice(make(state=None), 10) for document in batch.documents]

    in_order = documents(config)
    assert documents(replace(config, window_pool_tokens=0), shuffled=True) == in_order
    shuffled = documents(config, shuffled=True)
    assert shuffled != in_order
    assert documents(replace(config, seed=1), shuffled=True) != shuffled


def test_the_pool_decides_what_is_trained_on(config: RunConfig) -> None:
    def first(config: RunConfig) -> torch.Tensor:
        batch, _ = next(iter(Source(config).batches(None)))
        return batch["layers.2"]

    assert torch.equal(first(config), first(config))
    assert not torch.equal(first(config), first(replace(config, window_pool_tokens=0)))


def test_the_plan_says_what_comes_first(config: RunConfig, tmp_path: Path) -> None:
    plan = make_plan(Source(config), tmp_path / "r")
    assert plan.first_tokens == 2 * 64  # 5 batches in the buffer: blocks of 2, 3 batches held
    assert plan.start == "Running the model on the first 128 tokens."
    assert replace(plan, steps_done=3).start == (
        "Running the model again to restore the shuffle buffer, on at most 640 tokens."
    )
    timed = replace(plan, batch_seconds=1.0)
    assert timed.first_seconds == 2.0
    assert "The first step starts after about 2 s." in str(timed)


def stored(config: RunConfig, folder: Path) -> RunConfig:
    harvest(
        model=config.model,
        text=config.text,
        hook="layers.2",
        tokens=64 * STEPS,
        out=folder,
        context_length=32,
        held_out_share=0.2,
        window_pool_tokens=config.window_pool_tokens,
    )
    return with_activations(config, folder)


def test_a_run_on_harvested_activations_says_that_it_has_no_buffer(config: RunConfig, tmp_path: Path) -> None:
    config = stored(config, tmp_path / "acts")
    plan = plan_run(config, tmp_path / "r")
    assert (plan.buffer_bytes, plan.window_pool_bytes, plan.first_tokens) == (0, 0, 0)
    assert plan.batch_seconds is not None
    said: list[str] = []
    run = go(config, tmp_path / "r", say=said.append)
    assert run.finished
    assert said[1] == (
        "Verifying the checksums of the harvested activations. They are read from disk in random order, without window "
        "pool or shuffle buffer."
    )
    assert_same_run(run, go(replace(config, buffer_tokens=64), tmp_path / "other"))


def test_a_run_on_harvested_activations_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(config, tmp_path / "acts")
    whole = go(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, ctrl_c)
        with pytest.raises(Interrupted):
            go(config, tmp_path / "r")
    assert_same_run(whole, go(config, tmp_path / "r"))


@pytest.mark.parametrize("harvested", [False, True])
def test_an_unfinished_run_of_an_earlier_version_is_refused(
    harvested: bool, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(config, tmp_path / "acts") if harvested else config
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, ctrl_c)
        with pytest.raises(Interrupted):
            go(config, tmp_path / "r")
    progress = tmp_path / "r" / "checkpoint" / "step-00000009" / "progress.json"
    old = {"upstream": {"upstream": {"epoch": 0, "document": 3}, "window": 2}, "rows": 7, "block": 1, "batch": 2}
    write_sealed(progress, json.loads(progress.read_text()) | {"stream": old})
    without_pool(tmp_path / "r")
    with pytest.raises(
        UserError, match=r"^state must have the keys .*; got upstream, rows, block, batch\. It was written by"
    ):
        go(config, tmp_path / "r")
    assert progress.exists()


def test_a_finished_run_of_an_earlier_version_is_still_the_same_run(
    config: RunConfig, finished_run: Run, tmp_path: Path, tiny_model_folder: Callable[[str], Path]
) -> None:
    config = replace(config, window_pool_tokens=None)
    run = go(config, tmp_path / "r")
    without_pool(tmp_path / "r")
    said: list[str] = []
    again = go(config, tmp_path / "r", say=said.append)
    assert again.config == config
    assert "is already finished; nothing is trained or logged." in said[0]
    assert_same_run(run, again)


def without_pool(folder: Path) -> None:
    """Remove the field from the config, as in a run folder of an earlier version."""
    about = json.loads((folder / "run.json").read_text())
    if about["config"].pop("window_pool_tokens") is not None:
        about["config"]["window_pool_tokens"] = 1024  # of `tiny_config`, which is not the default
    write_sealed(folder / "run.json", about)


def test_the_default_pool_holds_many_forward_passes_of_any_length(config: RunConfig) -> None:
    long = replace(config, window_pool_tokens=None, model_batch=64, context_length=32_768)
    assert long.pool_tokens == 16 * 64 * 32_768
    assert replace(config, window_pool_tokens=None).pool_tokens == 2**20
