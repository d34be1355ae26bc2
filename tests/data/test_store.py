"""Writing of activations: shards, settings, interruptions at every point, damage."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stored_activations import WIDTHS, Numbered, contents, numbered, store

from kronsae.data.buffer import Activations
from kronsae.data.manifest import MANIFEST, PROGRESS, Manifest, read_manifest
from kronsae.data.places import LocalPlace
from kronsae.data.precision import PRECISIONS
from kronsae.data.store import stored_bytes
from kronsae.data.stored import HarvestedRows
from kronsae.data.stream import State
from kronsae.support.errors import UserError
from kronsae.support.files import folder_lock


class LightsOutError(Exception):
    """What ends a process in these tests, as a SIGKILL would: nothing else is written after it."""


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    manifest = store(tmp_path / "acts")
    assert manifest == read_manifest(tmp_path / "acts")
    assert (manifest.tokens, manifest.d_in, manifest.dtype) == (100, WIDTHS, "float32")
    assert manifest.metadata == {"model": "m"}
    assert [shard.tokens for shard in manifest.shards] == [30, 30, 30, 10]
    assert sorted(contents(tmp_path / "acts")) == [*(shard.file for shard in manifest.shards), MANIFEST]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 90, 100])
def test_the_size_is_known_before_to_the_byte(dtype: str, tokens: int, tmp_path: Path) -> None:
    manifest = store(tmp_path / "acts", dtype=dtype, tokens=tokens, shard_bytes=200)
    size = sum(path.stat().st_size for path in (tmp_path / "acts").glob("*.safetensors"))
    assert stored_bytes(WIDTHS, dtype, tokens, 200) == (len(manifest.shards), size)
    assert [shard.bytes for shard in manifest.shards] == [
        (tmp_path / "acts" / shard.file).stat().st_size for shard in manifest.shards
    ]


def test_a_shard_holds_at_least_a_row(tmp_path: Path) -> None:
    assert [shard.tokens for shard in store(tmp_path / "acts", tokens=3, shard_bytes=1).shards] == [1, 1, 1]


def test_a_finished_folder_is_left_as_it_is(tmp_path: Path) -> None:
    first = store(tmp_path / "acts")
    before = contents(tmp_path / "acts")

    def never(*, state: State | None = None) -> Numbered:
        raise AssertionError("the stream is not needed")

    assert store(tmp_path / "acts", never) == first
    assert contents(tmp_path / "acts") == before


def test_interrupted_at_every_file_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 shards, their progress and the manifest are 5 files; each is the last one that is (or is not) written."""
    options: dict[str, Any] = {"dtype": "int8", "tokens": 50, "shard_bytes": 330}
    store(tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    assert len(expected) == 3
    write = LocalPlace.write
    for stop in range(5):
        for after in (False, True):
            folder = tmp_path / f"{stop}-{after}"
            with monkeypatch.context() as patch:
                patch.setattr(LocalPlace, "write", stopped_at(write, stop, after))
                with pytest.raises(LightsOutError):
                    store(folder, **options)
            if not after:
                (folder if folder.exists() else tmp_path).joinpath(".activations-00001.safetensors.tmp").touch()
            assert (folder / MANIFEST).exists() == (stop == 4 and after)
            store(folder, **options)
            assert contents(folder) == expected, (stop, after)


def stopped_at(write: Any, number: int, after: bool) -> Any:
    """Return a ``LocalPlace.write`` that raises at the file with this number, before or after it is written."""
    done = 0

    def stopping(self: LocalPlace, file: str, fill: Any) -> None:
        nonlocal done
        done += 1
        if done == number + 1 and not after:
            raise LightsOutError
        write(self, file, fill)
        if done == number + 1:
            raise LightsOutError

    return stopping


def test_a_stream_is_not_read_again_from_its_beginning(tmp_path: Path) -> None:
    """An interrupted harvest continues with the item of which the last shard has a part."""
    with pytest.raises(LightsOutError):
        store(tmp_path / "acts", partial(Ending, 10))
    assert sorted(contents(tmp_path / "acts")) == [f"activations-0000{n}.safetensors" for n in (0, 1)] + [PROGRESS]
    with pytest.raises(
        UserError, match=r"^folder must contain a finished harvest; the one in '.*acts' was interrupted"
    ):
        read_manifest(tmp_path / "acts")
    started: list[State | None] = []

    def watched(*, state: State | None = None) -> Numbered:
        started.append(state)
        return Numbered(state=state)

    done: list[tuple[int, int]] = []
    store(tmp_path / "acts", watched, progress=lambda *both: done.append(both))
    assert started == [{"item": 8}]  # 60 rows: 8 items and 4 rows of the next
    assert done == [(90, 100), (100, 100)]


class Ending:
    """`Numbered` that fails after some items."""

    def __init__(self, items: int, *, state: State | None = None) -> None:
        self._items, self._inner = items, Numbered(state=state)

    def __iter__(self) -> Iterator[tuple[Activations, State]]:
        for values, state in self._inner:
            if state["item"] > self._items:
                raise LightsOutError
            yield values, state


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 90}, "tokens: 100 -> 90"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' -> 'bfloat16'"),
        ({"shard_bytes": 240}, "shard_bytes: 360 -> 240"),
        ({"metadata": {"model": "other"}}, "model: 'm' -> 'other'"),
        ({"metadata": {"model": "m", "seed": 1}}, "seed: None -> 1"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_by_name(
    changes: dict[str, Any], named: str, finished: bool, tmp_path: Path
) -> None:
    if finished:
        store(tmp_path / "acts")
    else:
        with pytest.raises(LightsOutError):
            store(tmp_path / "acts", partial(Ending, 10))
    before = contents(tmp_path / "acts")
    with pytest.raises(UserError) as caught:
        store(tmp_path / "acts", **changes)
    assert str(caught.value) == (
        f"out must be a new folder or hold a harvest with the same settings; {tmp_path / 'acts'} holds another one "
        f"({named}). Give another folder, or remove it."
    )
    assert contents(tmp_path / "acts") == before


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "acts"),
        pytest.raises(UserError, match=r"another kronsae process is writing to .*acts"),
    ):
        store(tmp_path / "acts")


def test_a_value_beyond_the_precision_is_an_error(tmp_path: Path) -> None:
    def stream(*, state: State | None = None) -> list[tuple[Activations, State]]:
        return [({"a": torch.full((4, 2), 1e6)}, {"item": 1})]

    with pytest.raises(
        UserError,
        match=r"dtype must represent every activation; got float16 with 1e\+06 at hook 'a'\. Give bfloat16",
    ):
        store(tmp_path / "acts", stream, d_in={"a": 2}, tokens=4, dtype="float16")
    assert not (tmp_path / "acts").exists()


def test_a_stream_that_ends_early_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens must not exceed the number of tokens in the text; got 500 with 140\."):
        store(tmp_path / "acts", tokens=500)
    with pytest.raises(
        UserError, match=r"d_in must be the widths of the stream's hooks; got {'a': 2} with {'a': 2, 'b'"
    ):
        store(tmp_path / "other", d_in={"a": 2})
    assert not (tmp_path / "other").exists()


def test_an_error_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    for name in ("acts", "new"):
        with pytest.raises(LightsOutError):
            store(tmp_path / name, partial(Ending, 3))
    assert contents(tmp_path / "acts") == {}
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    """A limit of 400 bytes per file stands for the full disk; a shard of 30 rows has 360 bytes and its header."""
    resource = pytest.importorskip("resource")
    store(tmp_path / "whole")
    with pytest.raises(LightsOutError):
        store(tmp_path / "acts", partial(Ending, 10))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"^'.*-00002\.safetensors' must be writable; got .*Free space or correct the"
        ):
            store(tmp_path / "acts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(contents(tmp_path / "acts")) == [f"activations-0000{n}.safetensors" for n in (0, 1)] + [PROGRESS]
    store(tmp_path / "acts")
    assert contents(tmp_path / "acts") == contents(tmp_path / "whole")


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"^out must be a new or empty folder, or hold a harvest; .*such as 'letter.txt'"
    ):
        store(tmp_path / "mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^out must be a folder; .*file is a file\. Name another one\.$"):
        store(tmp_path / "file")
    with pytest.raises(
        UserError, match=r"^out must be a folder that can be created; .*file/acts cannot be created in .*file\."
    ):
        store(tmp_path / "file" / "acts")
    assert contents(tmp_path / "mine") == {"letter.txt": b"mine"}
    assert (tmp_path / "file").read_text() == "mine"


def test_writing_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dtype must be one of float32, bfloat16, float16, int8; got 'int9'.*'int8'"):
        store(tmp_path / "acts", dtype="int9")
    with pytest.raises(UserError, match=r"tokens and shard_bytes must be at least 1; got 0 and 5"):
        store(tmp_path / "acts", tokens=0, shard_bytes=5)
    assert not (tmp_path / "acts").exists()


def test_a_damaged_or_incomplete_progress_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(LightsOutError):
        store(tmp_path / "acts", partial(Ending, 10))
    path = tmp_path / "acts" / PROGRESS
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"rows": 4', b'"rows": 5'))
    with pytest.raises(UserError, match=r"^'.*progress\.json' must be unchanged since it was written; it is damaged\."):
        store(tmp_path / "acts")
    path.write_bytes(good)
    (tmp_path / "acts" / "activations-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"every shard of manifest\.json; '.*-00001\.safetensors' is missing\."):
        store(tmp_path / "acts")


def all_rows(folder: Path) -> torch.Tensor:
    return torch.cat([values["a"] for values, _ in HarvestedRows(folder, repeat=False)])


@pytest.mark.parametrize("many", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("truncated", [False, True])
def test_every_damage_is_noticed_and_named(truncated: bool, many: int, tmp_path: Path) -> None:
    """Flip one bit, or cut off the end, of a shard or of the manifest, at random places."""
    folder = tmp_path / "acts"
    store(folder)
    files = sorted(folder.iterdir())
    draw = random.Random(0)
    expected = all_rows(folder)
    for number in range(many):
        path = files[number % len(files)]
        good = path.read_bytes()
        place = draw.randrange(len(good))
        bad = bytearray(good[:place] if truncated else good)
        if not truncated:
            bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        os.utime(path, ns=(number, number))  # a digest is kept by size and time
        with pytest.raises(UserError) as caught:
            all_rows(folder)
        assert str(path) in str(caught.value), (path.name, place)
        path.write_bytes(good)
        os.utime(path, ns=(10**9 + number, 10**9 + number))
    assert torch.equal(all_rows(folder), expected)


def test_the_digest_covers_every_byte_of_the_manifest(tmp_path: Path) -> None:
    store(tmp_path / "acts")
    path = tmp_path / "acts" / MANIFEST
    fields = json.loads(path.read_text())
    for text in (json.dumps(fields), path.read_text() + " ", path.read_text().replace("30", "31", 1)):
        path.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json' must be unchanged since it was written; it is damaged"):
            read_manifest(tmp_path / "acts")


def test_what_rounding_costs_is_stored(tmp_path: Path) -> None:
    def normal(*, state: State | None = None) -> list[tuple[Activations, State]]:
        values = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
        return [({"a": 3 + values}, {"item": 1})]

    def lost(dtype: str) -> Manifest:
        return store(tmp_path / dtype, normal, d_in={"a": 64}, tokens=1000, shard_bytes=2**20, dtype=dtype)

    exact = all_rows_of(normal)
    for dtype in ("bfloat16", "int8"):
        (shard,) = lost(dtype).shards
        error = (all_rows(tmp_path / dtype) - exact).double().square().sum() / (exact - exact.mean(0)).square().sum()
        assert shard.lost_variance is not None
        assert shard.lost_variance["a"] == pytest.approx(float(error), rel=1e-3)
        assert 0 < float(error) < 1e-3
    (shard,) = lost("float32").shards
    assert shard.lost_variance == {}


def all_rows_of(make: Any) -> torch.Tensor:
    return torch.cat([values["a"] for values, _ in make()])


def test_numbered_resumes() -> None:
    states = [state for _, state in numbered()]
    assert next(iter(numbered(state=states[3])))[1] == states[4]
