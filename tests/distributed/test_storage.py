"""Test the files of a checkpoint of several processes: no damage is read, and nothing in them is executed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from tests.distributed.processes import in_processes
from tests.distributed.states import save_apart_in_team, save_in_team

from kronsae.distributed.checkpoint import load_shards
from kronsae.runs.recipes import kron
from kronsae.support.errors import UserError
from kronsae.training.member import Member
from kronsae.training.state import Checkpoint, newest_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of four processes, two parts of a dictionary each twice, and the state that it holds."""
    folder = tmp_path_factory.mktemp("saved")
    (expected, *_) = in_processes(4, save_in_team, folder / "work", folder / "checkpoint")
    assert not isinstance(expected, BaseException), expected.__notes__
    return folder / "checkpoint", expected


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    member = Member(kron(num_heads=4, d_base=2, d_extension=2, k=2, seed=5), 8, "h", 4)
    load_shards(None, newest(folder), [member])
    return member.state()


def newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_one_process_has_the_same_state(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = saved
    found = loaded(folder)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    progress = newest(folder).progress
    assert (progress.step, progress.stream) == (3, {"batch": 3})


def test_every_tensor_is_written_once_and_divided(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = saved
    (checkpoint,) = folder.glob("step-*")
    layout = json.loads((checkpoint / "layout.json").read_text("utf-8"))
    assert len(list(folder.iterdir())) == 1  # no partial folder is left
    size = sum(path.stat().st_size for path in checkpoint.glob("state-*.safetensors"))
    assert size < 1.1 * sum(value.nbytes for value in expected.values()) + 4 * 6000  # the headers of four files
    tensors = layout["tensors"]
    assert [chunk["offsets"] for chunk in tensors["kron/sae.encoder.weight"]["chunks"]] == [[0, 0, 0], [2, 0, 0]]
    assert [chunk["sizes"] for chunk in tensors["kron/optimizer.decoder.W_dec.exp_avg_sq"]["chunks"]] == [[8, 8]] * 2
    assert len(tensors["kron/sae.decoder.b_dec"]["chunks"]) == 1


def damage(path: Path, how: str, seed: int) -> None:
    """Flip a bit of a file, or cut its end off."""
    found, draw = bytearray(path.read_bytes()), random.Random(seed)
    place = draw.randrange(len(found))
    if how == "truncated":
        del found[place:]
    else:
        found[place] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(found))


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damage_is_found_and_named(how: str, saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = saved
    (checkpoint,) = folder.glob("step-*")
    paths = sorted(checkpoint.iterdir())
    assert [path.name for path in paths] == [
        "layout.json",
        "progress.json",
        *(f"state-0000{rank}.safetensors" for rank in range(4)),
    ]
    for seed in range(60):
        path = paths[seed % len(paths)]
        whole = path.read_bytes()
        damage(path, how, seed)
        try:
            with pytest.raises(UserError, match=rf"^the checkpoint {re.escape(str(path))} is damaged \(.*\)\. "):
                loaded(folder)
        finally:
            path.write_bytes(whole)
    assert loaded(folder).keys() == expected.keys()


def test_a_folder_that_not_all_processes_see_is_refused(tmp_path: Path) -> None:
    results = in_processes(2, save_apart_in_team, tmp_path / "work", tmp_path)
    (told,) = (str(result) for result in results if isinstance(result, UserError))
    assert told.endswith(
        " could not be written (out must be on a file system that all processes see; state-00001.safetensors is "
        "missing there)."
    )
    assert not list((tmp_path / "machine-0").glob("step-*"))


def test_a_missing_file_is_named(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = saved
    (checkpoint,) = folder.glob("step-*")
    path = sorted(checkpoint.glob("state-*"))[1]
    path.rename(tmp_path / path.name)
    try:
        with pytest.raises(UserError, match=path.name):
            loaded(folder)
    finally:
        (tmp_path / path.name).rename(path)


def test_the_checkpoint_of_another_sae_is_refused(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    other = Member(kron(num_heads=8, d_base=2, d_extension=2, k=2), 8, "h", 4)
    with pytest.raises(UserError, match=r"the state of 'kron' is missing or misshapen in the checkpoint \(sae\."):
        load_shards(None, newest(folder), [other])
