from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kronsae.data import store
from kronsae.data.buffer import Activations
from kronsae.data.store import MANIFEST, StoredActivations, read_manifest, write_activations
from kronsae.data.stream import State
from kronsae.support.errors import UserError
from kronsae.support.files import sha256

Change = Callable[[Path], object]


def activations(items: int = 20, rows: int = 7) -> Iterator[tuple[Activations, State]]:
    """Yield consecutively numbered rows; hook "a" has width 2, hook "b" width 1."""
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
    stream = StoredActivations(folder, batch_size=10, repeat=False)
    batches = [values for values, _ in stream]
    served = [number for values in batches for number in numbers(values)]
    assert sorted(served) == list(range(100))
    assert all(len({number // 30 for number in numbers(values)}) >= 2 for values in batches)
    assert all(torch.equal(values["a"][:, :1], -values["b"]) for values in batches)


def test_epochs_differ_and_drop_what_does_not_fill_a_batch(folder: Path) -> None:
    batches = list(itertools.islice(StoredActivations(folder, batch_size=8), 36))
    epochs = [[number for values, _ in batches[12 * e : 12 * e + 12] for number in numbers(values)] for e in range(3)]
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [state for _, state in batches[10:14]] == [
        {"epoch": 0, "next_batch": 11},
        {"epoch": 0, "next_batch": 12},
        {"epoch": 1, "next_batch": 1},
        {"epoch": 1, "next_batch": 2},
    ]


def test_every_shard_has_its_share_of_every_batch(tmp_path: Path) -> None:
    """The number of rows of a shard in a batch of 400 from 40 shards is hypergeometric: mean 10, variance about 9.5.

    If shards were read one after another, a batch would have 400 rows of one shard. The variance of 40 * 40 counts must
    be within 6 of its standard errors, which are about sqrt(2 / 1600) of it.
    """
    write_activations(activations(1600, 10), tmp_path / "acts", tokens=16_000, shard_tokens=400)
    batches = [numbers(values) for values, _ in StoredActivations(tmp_path / "acts", batch_size=400, repeat=False)]
    counts = torch.stack([torch.bincount(torch.tensor(batch) // 400, minlength=40) for batch in batches]).double()
    assert counts.shape == (40, 40)
    expected = 10 * (1 - 1 / 40) * (16_000 - 400) / (16_000 - 1)
    assert float(counts.var()) == pytest.approx(expected, rel=6 * (2 / 1600) ** 0.5)


def test_batches_are_owned_and_aligned(folder: Path) -> None:
    batches = [values for values, _ in StoredActivations(folder, batch_size=9, repeat=False)]
    kept = [values["a"].clone() for values in batches]
    assert all(rows.data_ptr() % 64 == 0 for values in batches for rows in values.values())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert all(torch.equal(values["a"], rows) for values, rows in zip(batches, kept, strict=True))


def test_only_the_rows_of_a_batch_are_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and reading allocate a batch, not a shard, because shards are memory-mapped."""
    write_activations(activations(20, 1000), tmp_path / "acts", tokens=20_000, shard_tokens=10_000)
    largest = 0
    empty = torch.empty

    def watched(*sizes: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        found = empty(*sizes, **options)
        largest = max(largest, found.shape[0])
        return found

    monkeypatch.setattr(torch, "empty", watched)
    stream = iter(StoredActivations(tmp_path / "acts", batch_size=100))
    next(stream)
    assert largest == 100
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text(encoding="utf-8").count(str(tmp_path)) == 2


def test_a_folder_of_another_hook_s_rows_is_read_by_hook(folder: Path) -> None:
    values, _ = next(iter(StoredActivations(folder, batch_size=10, hooks=["b"])))
    assert list(values) == ["b"]
    both, _ = next(iter(StoredActivations(folder, batch_size=10)))
    assert torch.equal(both["b"], values["b"])


def test_files_are_checked_before_the_first_batch_and_again_only_if_they_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def recorded(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr(store, "sha256", recorded)
    next(iter(StoredActivations(folder, batch_size=10)))
    assert sorted(read) == [shard.file for shard in read_manifest(folder).shards]
    next(iter(StoredActivations(folder, batch_size=10)))
    assert len(read) == 4
    flip_a_byte(folder)
    os.utime(folder / "activations-00002.safetensors", ns=(0, 0))
    with pytest.raises(UserError, match="it is damaged"):
        next(iter(StoredActivations(folder, batch_size=10)))
    assert read[4:] == ["activations-00002.safetensors"]


def test_a_state_of_the_order_by_shards_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^state must have the keys epoch, next_batch; got upstream, .*It was written by"
    ):
        StoredActivations(folder, batch_size=10, state={"upstream": None, "rows": 0, "block": 0, "batch": 3})


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
    for batch_size in (8, 1400):
        values, _ = next(iter(StoredActivations(tmp_path / "half", batch_size=batch_size)))
        full, _ = next(iter(StoredActivations(tmp_path / "full", batch_size=batch_size)))
        assert values["a"].dtype == torch.float32
        assert torch.equal(values["a"], full["a"].to(getattr(torch, dtype)).float())


def test_a_value_beyond_the_precision_is_an_error(tmp_path: Path) -> None:
    stream = [({"a": torch.full((4, 2), 1e6)}, {"item": 1})]
    with pytest.raises(
        UserError,
        match=r"dtype must represent every activation; got float16 with 1e\+06 at hook 'a'\. Give bfloat16",
    ):
        write_activations(stream, tmp_path / "acts", tokens=4, dtype="float16")
    assert not (tmp_path / "acts").exists()


def test_a_stream_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens must not exceed the number of tokens in the text; got 500 with 140\."):
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
    with pytest.raises(UserError, match=r"^out must be a new or empty folder; .*acts contains files\. Give another"):
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
        (flip_a_byte, r"'.*activations-00002\.safetensors' must be unchanged since it was written; it is damaged"),
        (
            lambda folder: (folder / "activations-00001.safetensors").unlink(),
            r"every shard of manifest\.json; .*-00001.* is missing",
        ),
        (
            lambda folder: (folder / MANIFEST).unlink(),
            r"must contain harvested activations; '.*acts' has no manifest\.json",
        ),
        (truncate_manifest, r"harvested activations: .*manifest\.json cannot be read as JSON"),
        (change_manifest(surprise=1), r"manifest\.json' must be unchanged since it was written; it is damaged"),
        (change_manifest(shards=[]), r"manifest\.json' must be unchanged since it was written; it is damaged"),
        (
            change_manifest(shards=[{"file": "../x", "tokens": 1, "sha256": ""}]),
            r"must be unchanged since it was written; it is damaged",
        ),
        (change_manifest(format="other-2"), r"must have the format kronsae-activations-1; got 'other-2' in"),
    ],
)
def test_damage_is_noticed(damage: Change, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        list(StoredActivations(folder, batch_size=10, repeat=False))


def test_a_batch_larger_than_the_folder_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size must not exceed the number of activations; got 128 with 100"):
        list(StoredActivations(folder, batch_size=128, repeat=False))
