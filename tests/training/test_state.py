"""Test that checkpoints are written atomically and that damage is detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kronsae.runs.recipes import topk
from kronsae.support.errors import UserError
from kronsae.training import state
from kronsae.training.member import Member
from kronsae.training.state import Progress, load_members, load_progress, save_state

PROGRESS = Progress(step=7, tokens=112, seconds=1.25, stream={"upstream": None, "block": 2})


@pytest.fixture
def member() -> Member:
    member = Member(topk(d_sae=16, k=2), 8, "h", 10)
    member.step(torch.randn(4, 8), 0, want_metrics=False)
    return member


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    assert names(tmp_path) == ["step-00000007"]
    assert names(tmp_path / "step-00000007") == ["progress.json", "state.safetensors"]
    assert load_progress(tmp_path) == PROGRESS
    other = Member(topk(d_sae=16, k=2, seed=4), 8, "h", 10)
    load_members(tmp_path, [other])
    assert member.state().keys() == other.state().keys()
    assert all(torch.equal(value, other.state()[key]) for key, value in member.state().items())


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_progress(tmp_path) is None
    assert load_progress(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match=r"^the checkpoint folder must hold a checkpoint; .* holds none"):
        load_members(tmp_path, [])


def test_the_newest_one_counts_and_the_older_ones_go(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    newer = Progress(step=100_000_000, tokens=9, seconds=2.0, stream=None)  # one digit more than the names have
    save_state(tmp_path, [member], newer)
    assert names(tmp_path) == ["step-100000000"]
    assert load_progress(tmp_path) == newer


@pytest.mark.parametrize("moment", ["save_file", "write_json", "rename"])
def test_stopped_in_the_middle_the_older_one_stands(
    moment: str, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, [member], PROGRESS)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if moment == "rename":
        monkeypatch.setattr(Path, "rename", stop)
    else:
        monkeypatch.setattr(state, moment, stop)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, [member], Progress(step=8, tokens=128, seconds=2.0, stream=None))
    monkeypatch.undo()
    assert load_progress(tmp_path) == PROGRESS
    load_members(tmp_path, [member])
    save_state(tmp_path, [member], Progress(step=8, tokens=128, seconds=2.0, stream=None))
    assert names(tmp_path) == ["step-00000008"]


def test_stopped_before_the_older_one_is_gone_the_newer_one_counts(member: Member, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    save_state(new, [member], PROGRESS)
    save_state(old, [member], Progress(step=3, tokens=48, seconds=1.0, stream=None))
    (new / "step-00000007").rename(old / "step-00000007")
    assert load_progress(old) == PROGRESS


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _without(key: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path)
        del tensors[key]
        save_file(tensors, path)

    return change


def _misshapen(path: Path) -> None:
    tensors = load_file(path)
    tensors["topk/sae.decoder.b_dec"] = torch.zeros(3)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage", [_half, Path.unlink, _without("topk/sae.decoder.W_dec"), _without("topk/seconds"), _misshapen]
)
def test_damaged_weights_are_told(damage: Callable[[Path], None], member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    damage(tmp_path / "step-00000007" / "state.safetensors")
    with pytest.raises(UserError, match=r"^the checkpoint .*safetensors is damaged .* Remove the run folder and start"):
        load_members(tmp_path, [member])


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"step": 1, "stride": 2}), "\0\xff"])
def test_a_damaged_progress_is_told(content: str, member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    (tmp_path / "step-00000007" / "progress.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"^the checkpoint .*progress.json is damaged .* Remove the run folder"):
        load_progress(tmp_path)
