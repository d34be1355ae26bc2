"""Test that checkpoints are written atomically, that two are kept, and that damage is detected and never loaded."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kronsae.runs.recipes import topk
from kronsae.support.errors import UserError
from kronsae.support.sealed import write_sealed
from kronsae.training import state
from kronsae.training.member import Member
from kronsae.training.state import Checkpoint, Progress, load_members, newest_checkpoint, save_state, verified

PROGRESS = Progress(step=7, tokens=112, seconds=1.25, stream={"upstream": None, "block": 2})
LATER = Progress(step=8, tokens=128, seconds=2.0, stream=None)


@pytest.fixture
def member() -> Member:
    member = Member(topk(d_sae=16, k=2), 8, "h", 10)
    member.step(torch.randn(4, 8), 0, want_metrics=False)
    return member


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_round_trip(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    assert names(tmp_path) == ["step-00000007"]
    assert names(tmp_path / "step-00000007") == ["progress.json", "state.safetensors"]
    assert newest(tmp_path) == Checkpoint(tmp_path / "step-00000007", PROGRESS)
    other = Member(topk(d_sae=16, k=2, seed=4), 8, "h", 10)
    load_members(newest(tmp_path), [other])
    assert member.state().keys() == other.state().keys()
    assert all(torch.equal(value, other.state()[key]) for key, value in member.state().items())


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_two_are_kept_and_the_newest_counts(member: Member, tmp_path: Path) -> None:
    for step in (7, 99_999_999, 100_000_000):  # the last has one digit more than the names have
        save_state(tmp_path, [member], Progress(step=step))
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert newest(tmp_path).progress.step == 100_000_000


def test_never_more_than_two_are_on_the_disk(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arguments: Any) -> None:
        seen.append(names(tmp_path))
        save_file(*arguments)

    monkeypatch.setattr(state, "save_file", watched)
    for step in (1, 2, 3):
        save_state(tmp_path, [member], Progress(step=step))
    assert seen[1:] == [[".partial-00000002", "step-00000001"], [".partial-00000003", "step-00000002"]]


@pytest.mark.parametrize("moment", ["save_file", "write_sealed", "rename"])
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
        save_state(tmp_path, [member], LATER)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000007"]
    assert newest(tmp_path).progress == PROGRESS
    load_members(newest(tmp_path), [member])
    save_state(tmp_path, [member], LATER)
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


@pytest.mark.parametrize("moment", ["save_file", "rename", "mkdir"])
def test_on_a_full_disk_the_older_one_stands(
    moment: str, member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, [member], PROGRESS)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full) if moment == "save_file" else patch.setattr(Path, moment, full)
        with pytest.raises(UserError, match=r"^'.*' must be writable; got OSError \(.*No space left on device\)"):
            save_state(tmp_path, [member], LATER)
    assert names(tmp_path) == ["step-00000007"]
    assert newest(tmp_path).progress == PROGRESS


def _half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("file", ["state.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", [_half, Path.unlink])
def test_what_is_damaged_is_named(damage: Callable[[Path], None], file: str, member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    damage(tmp_path / "step-00000007" / file)
    with pytest.raises(UserError, match=rf"^the checkpoint.*step-00000007/{file} (is damaged \(.*\)\.|does not exist)"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("truncated", [False, True])
def test_every_damage_is_noticed_and_named(truncated: bool, member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    files = sorted((tmp_path / "step-00000007").iterdir())
    draw = random.Random(0)
    for number in range(60):
        path = files[number % 2]
        good = path.read_bytes()
        place = draw.randrange(len(good))
        bad = bytearray(good[:place] if truncated else good)
        if not truncated:
            bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(UserError) as caught:
            newest_checkpoint(tmp_path)
        assert str(caught.value).startswith(f"the checkpoint {path} is damaged ("), (path.name, place)
        assert str(caught.value).endswith(". Remove the run folder and start again.")
        path.write_bytes(good)
    assert newest(tmp_path).progress == PROGRESS


def test_the_one_before_a_damaged_one_is_used(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    save_state(tmp_path, [member], LATER)
    path = tmp_path / "step-00000008" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found == Checkpoint(tmp_path / "step-00000007", PROGRESS)
    size = path.stat().st_size
    assert said == [
        f"Warning: the checkpoint {path} is damaged (it has {size:,} bytes instead of {size + 1:,}). The training "
        "continues from the one before it, step-00000007."
    ]


def test_a_good_one_outlasts_a_later_damaged_one(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training went back to step 7 and is stopped while it writes: step 7 must still be there."""
    save_state(tmp_path, [member], PROGRESS)
    save_state(tmp_path, [member], Progress(step=9))
    _half(tmp_path / "step-00000009" / "state.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_state(tmp_path, [member], LATER)
    assert newest(tmp_path).progress == PROGRESS
    save_state(tmp_path, [member], LATER)
    assert newest(tmp_path).progress == LATER
    assert names(tmp_path) == ["step-00000007", "step-00000008"]


def test_if_all_are_damaged_the_newest_is_named(member: Member, tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, [member], Progress(step=step))
        _half(tmp_path / f"step-0000000{step}" / "progress.json")
    with pytest.raises(UserError, match=r"^the checkpoint .*step-00000002/progress\.json is damaged"):
        newest_checkpoint(tmp_path)


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
    "change", [_half, _without("topk/sae.decoder.W_dec"), _without("topk/seconds"), _misshapen, Path.unlink]
)
def test_the_state_of_something_else_is_told(change: Callable[[Path], None], member: Member, tmp_path: Path) -> None:
    """Checksums that fit do not make a state fit."""
    save_state(tmp_path, [member], PROGRESS)
    found = newest(tmp_path)
    change(found.folder / "state.safetensors")
    with pytest.raises(UserError, match=r"^the checkpoint .*safetensors is damaged .* Remove the run folder and start"):
        load_members(found, [member])


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"step": 1, "stride": 2}), "\0\xff"])
def test_a_strange_progress_is_told(content: str, member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    (tmp_path / "step-00000007" / "progress.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"^the checkpoint .*progress.json is damaged .* Remove the run folder"):
        newest_checkpoint(tmp_path)


def test_a_progress_of_a_later_version_is_told(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    path = tmp_path / "step-00000007" / "progress.json"
    write_sealed(path, json.loads(path.read_text()) | {"stride": 2})
    with pytest.raises(UserError, match=r"progress.json is damaged \(.*unexpected keyword argument 'stride'\)"):
        newest_checkpoint(tmp_path)


def test_one_of_an_earlier_version_has_no_checksums_and_is_read(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    path = tmp_path / "step-00000007" / "progress.json"
    fields = {key: value for key, value in json.loads(path.read_text()).items() if key in vars(PROGRESS)}
    del fields["history"]
    path.write_text(json.dumps(fields, indent=2))
    with pytest.warns(UserWarning, match=r"step-00000007 has no checksums and is read without"):
        assert verified(path.parent).progress == PROGRESS


def test_other_folders_are_no_checkpoints(member: Member, tmp_path: Path) -> None:
    save_state(tmp_path, [member], PROGRESS)
    shutil.copytree(tmp_path / "step-00000007", tmp_path / "step-mine")
    assert newest(tmp_path).folder.name == "step-00000007"
