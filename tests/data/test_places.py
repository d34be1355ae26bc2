"""Folders behind URLs: the same files as a local one, local copies within a bound, damage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.data.test_store import Ending, LightsOutError
from tests.stored_activations import contents, numbers, store

from kronsae.data import places
from kronsae.data.manifest import read_manifest
from kronsae.data.stored import HarvestedRows, StoredActivations
from kronsae.support.errors import UserError

URL = "memory://bucket/acts"


@pytest.fixture
def memory() -> Iterator[Any]:
    """Return fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "activations").glob("*"))


def test_a_url_has_the_files_of_a_folder(memory: Any, own_cache: Path, tmp_path: Path) -> None:
    store(tmp_path / "acts")
    with pytest.raises(LightsOutError):
        store(URL, partial(Ending, 10))
    store(URL)
    remote = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.ls("/bucket/acts", detail=False)}
    assert remote == contents(tmp_path / "acts")
    assert store(URL) == read_manifest(URL) == read_manifest(tmp_path / "acts")
    with pytest.raises(UserError, match=r"memory://bucket/acts holds another one \(tokens: 100 -> 99\)"):
        store(URL, tokens=99)
    local = list(StoredActivations(tmp_path / "acts", batch_size=8, repeat=False))
    again = list(StoredActivations(URL, batch_size=8, repeat=False))
    assert len(copies(own_cache)) == 4
    assert [state for _, state in local] == [state for _, state in again]
    assert all(torch.equal(one["a"], other["a"]) for (one, _), (other, _) in zip(local, again, strict=True))


def test_a_file_url_is_a_local_folder(tmp_path: Path, own_cache: Path) -> None:
    store(f"file://{tmp_path}/acts")
    store(tmp_path / "other")
    assert contents(tmp_path / "acts") == contents(tmp_path / "other")
    rows = [
        number for values, _ in HarvestedRows(f"file://{tmp_path}/acts", repeat=False) for number in numbers(values)
    ]
    assert rows == list(range(100))
    assert copies(own_cache) == []


def test_copies_stay_within_their_bound(memory: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = store(URL)
    monkeypatch.setenv(places.CACHE_VARIABLE, str(2.5 * (manifest.shards[0].bytes or 0) / 2**30))
    stream = HarvestedRows(URL)
    rows = [number for values, _ in islice(stream, 8) for number in numbers(values)]
    assert rows == 2 * list(range(100))
    assert len(copies(own_cache)) == 2
    with pytest.raises(UserError) as caught:
        StoredActivations(URL, batch_size=8)
    assert str(caught.value).startswith(
        f"activations that are read in random order must fit into the local cache; {URL} has "
    )
    assert "activation_order=harvested, which reads one shard after another." in str(caught.value)
    monkeypatch.setenv(places.CACHE_VARIABLE, "much")
    with pytest.raises(UserError, match=r"^KRONSAE_SHARD_CACHE_GB must be a number of GB above 0; got 'much'\.$"):
        StoredActivations(URL, batch_size=8)


def test_a_damaged_copy_is_replaced_and_a_damaged_original_named(memory: Any, own_cache: Path) -> None:
    manifest = store(URL)
    rows = [number for values, _ in HarvestedRows(URL, repeat=False) for number in numbers(values)]
    copy = copies(own_cache)[2]
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    again = [number for values, _ in HarvestedRows(URL, repeat=False) for number in numbers(values)]
    assert again == rows
    for path in copies(own_cache):
        path.unlink()
    file = f"/bucket/acts/{manifest.shards[1].file}"
    content = memory.cat_file(file)
    memory.pipe_file(file, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"'memory://bucket/acts/activations-00001\.safetensors' must be unchanged"):
        list(HarvestedRows(URL, repeat=False))
    assert len(copies(own_cache)) == 1
    memory.pipe_file(file, content[:-1])
    with pytest.raises(UserError, match=r"activations-00001\.safetensors' must be unchanged"):
        read_manifest(URL)


def test_a_url_that_cannot_be_opened_is_named(memory: Any) -> None:
    with pytest.raises(UserError, match=r"must be a local path or a URL that fsspec opens; got 'nowhere://x'"):
        read_manifest("nowhere://x")
    with pytest.raises(UserError, match=r"harvested activations; 'memory://empty' has no manifest\.json"):
        read_manifest("memory://empty")
