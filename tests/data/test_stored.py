"""Reading of activations: random and harvested order, resuming, memory, damage, folders of the first format."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stored_activations import (
    ROW_BYTES,
    Numbered,
    as_first_format,
    change_manifest,
    numbers,
    store,
)

from kronsae.data import stored
from kronsae.data.buffer import ShuffleBuffer
from kronsae.data.manifest import MANIFEST, read_manifest
from kronsae.data.stored import HarvestedRows, StoredActivations
from kronsae.data.stream import State
from kronsae.support.errors import UserError
from kronsae.support.files import sha256

Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store(tmp_path / "acts")
    return tmp_path / "acts"


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
    store(tmp_path / "acts", partial(Numbered, 1600, 10), tokens=16_000, shard_bytes=400 * ROW_BYTES)
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

    monkeypatch.setattr(stored, "sha256", recorded)
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
        store(tmp_path / name, partial(Numbered, 200), tokens=1400, shard_bytes=2**20, dtype=precision)
    sizes = [(tmp_path / name / "activations-00000.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    for batch_size in (8, 1400):
        values, _ = next(iter(StoredActivations(tmp_path / "half", batch_size=batch_size)))
        full, _ = next(iter(StoredActivations(tmp_path / "full", batch_size=batch_size)))
        assert values["a"].dtype == torch.float32
        assert torch.equal(values["a"], full["a"].to(getattr(torch, dtype)).float())


def flip_a_byte(folder: Path) -> None:
    path = folder / "activations-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def changed(**changes: Any) -> Change:
    return lambda folder: change_manifest(folder, **changes)


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
        (truncate_manifest, r"manifest\.json' must be unchanged since it was written; it is damaged"),
        (changed(surprise=1), r"manifest\.json' must be unchanged since it was written; it is damaged"),
        (changed(shards=[]), r"manifest\.json' must be unchanged since it was written; it is damaged"),
        (
            changed(shards=[{"file": "../x", "tokens": 1, "sha256": ""}]),
            r"must be unchanged since it was written; it is damaged",
        ),
        (changed(format="other-2"), r"must have the format kronsae-activations-2 or .*; got 'other-2' in"),
    ],
)
def test_damage_is_noticed(damage: Change, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        list(StoredActivations(folder, batch_size=10, repeat=False))


def test_a_batch_larger_than_the_folder_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size must not exceed the number of activations; got 128 with 100"):
        list(StoredActivations(folder, batch_size=128, repeat=False))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_of_the_first_format_is_read(dtype: str, tmp_path: Path) -> None:
    size = 360 if dtype == "float32" else 180
    for name in ("new", "old"):
        store(tmp_path / name, dtype=dtype, shard_bytes=size)
    as_first_format(tmp_path / "old")
    assert read_manifest(tmp_path / "old").format == "kronsae-activations-1"
    for make in (partial(StoredActivations, batch_size=9), HarvestedRows):
        new, old = (list(make(tmp_path / name, repeat=False)) for name in ("new", "old"))
        assert [state for _, state in new] == [state for _, state in old]
        assert all(torch.equal(one["a"], other["a"]) for (one, _), (other, _) in zip(new, old, strict=True))
    flip_a_byte(tmp_path / "old")
    with pytest.raises(UserError, match=r"activations-00002\.safetensors' must be unchanged"):
        list(HarvestedRows(tmp_path / "old", repeat=False))
    with pytest.raises(UserError, match=rf"holds another one \(shard_bytes: None -> {size}\)"):
        store(tmp_path / "old", dtype=dtype, shard_bytes=size)


def test_the_order_of_the_harvest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "READ_ROWS", 8)
    items = list(itertools.islice(HarvestedRows(folder), 30))
    assert [number for values, _ in items for number in numbers(values)][:200] == 2 * list(range(100))
    for at in range(28):
        state = json.loads(json.dumps(items[at][1]))
        (values, after), (following, _) = itertools.islice(HarvestedRows(folder, state=state), 2)
        assert (numbers(values), after) == (numbers(items[at + 1][0]), items[at + 1][1])
        assert numbers(following) == numbers(items[at + 2][0])
    assert sum(len(values["a"]) for values, _ in HarvestedRows(folder, repeat=False)) == 100


def test_a_shuffle_buffer_of_it_has_the_batches_of_the_stream(folder: Path) -> None:
    """As far as the folder reaches: 8 blocks of 3 batches of 4 rows, which give 8 * 3 - 3 batches."""
    options: dict[str, Any] = {"batch_size": 4, "buffer_tokens": 24, "seed": 3}
    live = [numbers(values) for values, _ in ShuffleBuffer(partial(Numbered, 100), **options)]
    stored_batches = [
        numbers(values) for values, _ in ShuffleBuffer(partial(HarvestedRows, folder, repeat=False), **options)
    ]
    from kronsae.data.buffer import buffer_order

    same = buffer_order(4, 24, 3).whole_batches(100)
    assert same == 21
    assert stored_batches[:same] == live[:same]
    assert stored_batches[: same + 1] != live[: same + 1]


def test_a_shard_is_checked_when_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_a_byte(folder)
    monkeypatch.setattr(stored, "READ_ROWS", 10)
    found: list[int] = []
    with pytest.raises(UserError, match=r"activations-00002\.safetensors' must be unchanged"):
        found.extend(number for values, _ in HarvestedRows(folder) for number in numbers(values))
    assert found == list(range(60))


MAKES: list[Callable[..., StoredActivations | HarvestedRows]] = [
    partial(StoredActivations, batch_size=10, repeat=False),
    partial(HarvestedRows, repeat=False),
]


def mappings_of(folder: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="counts mappings in /proc")
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_few_mappings_are_enough(
    allowed: int, make: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [numbers(values) for values, _ in make(folder)]
    stream = make(folder)
    stream._shards._most = allowed
    real, before = mmap.mmap, []

    def counted(*arguments: Any, **options: Any) -> mmap.mmap:
        before.append(mappings_of(folder))
        return real(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", counted)
    assert [numbers(values) for values, _ in stream] == expected
    assert max(before) == min(allowed, 3) - 1
    assert mappings_of(folder) == allowed


@pytest.mark.skipif(sys.platform != "linux", reason="counts mappings in /proc")
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("allowed", [2, 1, 0])
def test_mappings_make_room_where_the_address_space_is_limited(
    allowed: int, make: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [numbers(values) for values, _ in make(folder)]
    real, refused = mmap.mmap, []

    def limited(*arguments: Any, **options: Any) -> mmap.mmap:
        if mappings_of(folder) >= allowed:
            refused.append(arguments)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", limited)
    stream = make(folder)
    stream._shards._most = 4
    if allowed:
        assert [numbers(values) for values, _ in stream] == expected
        assert len(refused) == 1  # what was refused once is not tried again
    else:
        with pytest.raises(UserError, match=r"must be mapped into memory.*activations-0000.*`ulimit -v`"):
            list(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory that count allocations are Linux's")
def test_a_folder_larger_than_the_memory_is_read(tmp_path: Path) -> None:
    """64 MB of activations are read, at random and in order, in a process that may allocate 32 MB more than it has."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "acts")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "32768", "32768"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own size from /proc")
def test_mappings_leave_address_space_to_others(tmp_path: Path) -> None:
    """64 MB are mapped and 96 MB allocated in 160 MB of address space, of which a thread's stack takes 8 MB."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED_ADDRESSES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "acts")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # an arena of a thread reserves 64 MB
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["128", "batches"]


# RLIMIT_DATA counts what a process allocates, as malloc and private mappings do, and not files mapped for reading. The
# stack of the thread that reads ahead counts whole, with 8 MB.
WRITE = """
import resource, sys
from itertools import islice
import torch
torch.set_num_threads(1)
from kronsae.data.store import write_activations
from kronsae.data.stored import HarvestedRows, StoredActivations

WIDTH, TOKENS, MB = 512, 32_768, 2**20

def make(*, state=None):
    for item in range(0 if state is None else state["item"], TOKENS // 512):
        yield {"a": torch.full((512, WIDTH), float(item))}, {"item": item + 1}

write_activations(make, sys.argv[1], d_in={"a": WIDTH}, tokens=TOKENS, shard_bytes=2 * MB)
"""

LIMITED = (
    WRITE
    + """
next(iter(StoredActivations(sys.argv[1], batch_size=256)))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = 1024 * int(status["VmData"].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (used + 32 * MB, used + 32 * MB))
try:
    torch.empty(TOKENS, WIDTH).fill_(1)
    print("not refused")
except (RuntimeError, MemoryError):
    print("refused")
for stream in (StoredActivations(sys.argv[1], batch_size=256, repeat=False), HarvestedRows(sys.argv[1], repeat=False)):
    print(sum(len(values["a"]) for values, _ in stream))
"""
)

LIMITED_ADDRESSES = (
    WRITE
    + """
next(iter(StoredActivations(sys.argv[1], batch_size=256)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 160 * MB, used + 160 * MB))
batches = 0
for values, _ in StoredActivations(sys.argv[1], batch_size=256, repeat=False):
    torch.empty(96 * MB, dtype=torch.uint8)
    batches += 1
print(batches, "batches")
"""
)
