from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kronsae.data.buffer import Activations
from kronsae.data.store import MANIFEST, StoredActivations, read_manifest, write_activations
from kronsae.data.stream import State
from kronsae.support.errors import UserError

Change = Callable[[Path], object]


def activations(items: int = 20, rows: int = 7) -> Iterator[tuple[Activations, State]]:
    """Rows numbered through; hook "a" has width 2, hook "b" width 1."""
    for item in range(items):
        numbers_N1 = torch.arange(item * rows, (item + 1) * rows, dtype=torch.float32)[:, None]
        yield {"a": numbers_N1.expand(-1, 2), "b": -numbers_N1}, {"item": item + 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_activations(activations(), tmp_path / "acts", tokens=100, shard_tokens=30, metadata={"model": "m"})
    return tmp_path / "acts"


def numbers(values: Activations) -> list[int]:
    return [int(number) for number in values["a"][:, 0]]


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.tokens == 100
    assert manifest.d_in == {"a": 2, "b": 1}
    assert manifest.dtype == "float32"
    assert manifest.metadata == {"model": "m"}
    assert [shard.tokens for shard in manifest.shards] == [30, 30, 30, 10]
    assert sorted(path.name for path in folder.iterdir()) == [*(shard.file for shard in manifest.shards), MANIFEST]


def test_an_epoch_serves_each_row_once_and_mixes_shards(folder: Path) -> None:
    stream = StoredActivations(folder, batch_size=10, buffer_tokens=100, repeat=False)
    batches = [values for values, _ in stream]
    served = [number for values in batches for number in numbers(values)]
    assert sorted(served) == list(range(100))
    assert len({number // 30 for number in served[:20]}) >= 3
    assert all(torch.equal(values["a"][:, :1], -values["b"]) for values in batches)


def test_epochs_take_the_shards_in_another_order(folder: Path) -> None:
    batches = list(itertools.islice(StoredActivations(folder, batch_size=10, buffer_tokens=10), 40))
    first_rows = [min(numbers(values)) for values, _ in batches]
    epochs = [first_rows[10 * epoch : 10 * epoch + 10] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)


@pytest.mark.parametrize("repeat", [True, False])
def test_each_state_goes_on_exactly_after_its_batch(repeat: bool, folder: Path) -> None:
    def batches(state: State | None, count: int) -> list[tuple[list[int], State]]:
        stream = StoredActivations(folder, batch_size=8, seed=1, repeat=repeat, state=state)
        return [(numbers(values), state) for values, state in itertools.islice(stream, count)]

    whole = batches(None, 30)
    for at, (_, state) in enumerate(whole[:27]):
        assert batches(json.loads(json.dumps(state)), 3) == whole[at + 1 : at + 4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_files_and_comes_back_as_float32(dtype: str, tmp_path: Path) -> None:
    for name, precision in (("full", "float32"), ("half", dtype)):
        write_activations(activations(200), tmp_path / name, tokens=1400, dtype=precision)
    sizes = [(tmp_path / name / "activations-00000.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    values, _ = next(iter(StoredActivations(tmp_path / "half", batch_size=8)))
    assert values["a"].dtype == torch.float32


def test_a_value_beyond_the_precision_is_an_error(tmp_path: Path) -> None:
    stream = [({"a": torch.full((4, 2), 1e6)}, {"item": 1})]
    with pytest.raises(
        UserError,
        match=r"dtype must hold every activation; hook 'a' has one of size 1e\+06, which float16 cannot",
    ):
        write_activations(stream, tmp_path / "acts", tokens=4, dtype="float16")
    assert not (tmp_path / "acts").exists()


def test_a_stream_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens must not exceed what the text gives; got 500, and it ended after 140"):
        write_activations(activations(), tmp_path / "acts", tokens=500, shard_tokens=30)
    assert not (tmp_path / "acts").exists()


def test_an_error_of_the_stream_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[Activations, State]]:
        yield from activations(8)
        raise UserError("activations must be finite")

    (tmp_path / "acts").mkdir()
    with pytest.raises(UserError, match="activations must be finite"):
        write_activations(broken(), tmp_path / "acts", tokens=100, shard_tokens=30)
    assert list((tmp_path / "acts").iterdir()) == []


def test_only_a_new_or_empty_folder_is_written_to(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^out must be a new or empty folder; .*acts holds other files\. Name another"):
        write_activations(activations(), folder, tokens=10)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^out must be a folder; .*file is a file\. Name another one\.$"):
        write_activations(activations(), tmp_path / "file", tokens=10)
    with pytest.raises(
        UserError, match=r"^out must be a folder that can be created; .*file/acts cannot be created in .*file\."
    ):
        write_activations(activations(), tmp_path / "file" / "acts", tokens=10)
    assert (tmp_path / "file").read_text() == "mine"


def test_writing_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dtype must be one of float32, bfloat16, float16; got 'int8'"):
        write_activations(activations(), tmp_path / "acts", tokens=10, dtype="int8")
    with pytest.raises(UserError, match=r"tokens and shard_tokens must be at least 1; got 0 and 5"):
        write_activations(activations(), tmp_path / "acts", tokens=0, shard_tokens=5)
    assert not (tmp_path / "acts").exists()


def flip_a_byte(folder: Path) -> None:
    path = folder / "activations-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def change_manifest(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text()[:40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"'.*activations-00002\.safetensors' must be as it was written; it is damaged"),
        (lambda folder: (folder / "activations-00001.safetensors").unlink(), r"activations-00001.* is missing, though"),
        (
            lambda folder: (folder / MANIFEST).unlink(),
            r"must hold harvested activations; '.*acts' has no manifest\.json",
        ),
        (truncate_manifest, r"harvested activations: .*manifest\.json cannot be read as JSON"),
        (change_manifest(surprise=1), r"manifest\.json' must be as it was written; it is damaged"),
        (change_manifest(shards=[]), r"manifest\.json' must be as it was written; it is damaged"),
        (
            change_manifest(shards=[{"file": "../x", "tokens": 1, "sha256": ""}]),
            r"must be as it was written; it is damaged",
        ),
        (change_manifest(format="other-2"), r"must be of format kronsae-activations-1; '.*' says 'other-2'"),
    ],
)
def test_damage_is_noticed(damage: Change, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        list(StoredActivations(folder, batch_size=10, repeat=False))


def test_a_batch_larger_than_the_folder_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size must not exceed the activations there are; got 128 with 100"):
        list(StoredActivations(folder, batch_size=128, repeat=False))
