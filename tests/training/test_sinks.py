"""Test that metrics are always written as JSON lines, and to other sinks if configured and installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kronsae.support.errors import UserError
from kronsae.training.sinks import JsonlSink, TensorBoardSink, WandbSink, read_metrics, require


def row(step: int, sae: str = "a", **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "seconds": 0.5 * step, "sae": sae, "loss": 1 / step, **values}


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path, after_step=0)
    assert read_metrics(path) == []
    for step in (1, 2):
        sink.write(row(step, explained_variance=None))
    sink.flush()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        row(1, explained_variance=None),
        row(2, explained_variance=None),
    ]
    sink.close()


def test_a_resumed_run_drops_the_rows_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, after_step=0)
    for step in (1, 2, 3):
        sink.write(row(step, "a"))
        sink.write(row(step, "b"))
    sink.close()
    path.write_text(path.read_text() + '{"step": 4, "tok')  # killed while writing
    assert [r["step"] for r in read_metrics(path)] == [1, 1, 2, 2, 3, 3]
    sink = JsonlSink(path, after_step=2)
    assert [(r["step"], r["sae"]) for r in read_metrics(path)] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    sink.write(row(3, "c"))
    sink.close()
    assert [r["sae"] for r in read_metrics(path)] == ["a", "b", "a", "b", "c"]


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_can_be_read_back_and_repeated_work_is_hidden(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, after_tokens=0)
    for step in (1, 2, 3):
        sink.write(row(step, loss=float(step), explained_variance=None if step == 1 else 0.5))
    sink.flush()
    sink.close()
    sink = TensorBoardSink(tmp_path, after_tokens=20)  # carries on after step 2
    sink.write(row(3, loss=33.0))
    sink.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss/a", "explained_variance/a"]
    assert [(event.step, event.value) for event in events.Scalars("loss/a")] == [(10, 1.0), (20, 2.0), (30, 33.0)]
    assert [event.step for event in events.Scalars("explained_variance/a")] == [20]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_told_with_the_remedy(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        require(package)
    assert str(caught.value) == (
        f"{package} must be installed to log to it. Install it with: pip install 'kronsae[{package}]'"
    )


class FakeWandb(types.ModuleType):
    """A stub of the functions of wandb that the sink uses."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.failure, self.asked, self.logged, self.finished = failure, {}, [], False  # type: ignore[var-annotated]

    def init(self, **asked: Any) -> FakeWandb:
        if self.failure is not None:
            raise self.failure
        self.asked = asked
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "mine").mkdir()
    sink = WandbSink("project", tmp_path / "mine" / ".", {"hook": "layers.2"})
    sink.write(row(2, explained_variance=None))
    sink.flush()
    sink.close()
    assert {key: wandb.asked[key] for key in ("project", "name", "resume", "config")} == {
        "project": "project",
        "name": "mine",
        "resume": "allow",
        "config": {"hook": "layers.2"},
    }
    assert wandb.logged == [(2, {"a/loss": 0.5, "tokens": 20})]
    assert wandb.finished


def test_wandb_goes_on_with_the_run_of_the_same_folder_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_of(folder: Path) -> dict[str, Any]:
        wandb = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        WandbSink("project", folder, {}).close()
        return wandb.asked

    one, other = tmp_path / "a" / "kron", tmp_path / "b" / "kron"
    first, elsewhere = asked_of(one), asked_of(other)
    assert (first["name"], elsewhere["name"]) == ("kron", "kron")
    assert first["id"] != elsewhere["id"]
    one.rename(tmp_path / "moved")
    again = asked_of(tmp_path / "moved")
    assert (again["id"], again["resume"]) == (first["id"], "allow")
    assert "name" not in again


def test_a_wandb_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("No API key configured.\nUse wandb login.")))
    with pytest.raises(UserError) as caught:
        WandbSink("project", tmp_path, {})
    assert str(caught.value) == (
        "wandb could not be started (No API key configured). Try `wandb login`, or leave it out."
    )
    assert list(tmp_path.iterdir()) == []
