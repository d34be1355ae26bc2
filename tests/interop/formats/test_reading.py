"""Archives with too many entries, and the memory that reading takes."""

from __future__ import annotations

import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kronsae.interop import formats
from kronsae.interop.formats import reading
from kronsae.interop.formats.reading import MAX_ENTRIES, READING_BYTES, open_zip
from kronsae.support.errors import UserError

KIND = "a zip archive as NumPy writes"


def crowded(path: Path, entries: int, stated: int | None = None) -> Path:
    """Write an archive of empty entries by hand, as `zipfile` is slow for millions; ``stated``: in its end record."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    count = min(entries if stated is None else stated, 2**16 - 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(entry) * entries, 0, 0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(entry * entries + end)
    return path


@pytest.mark.parametrize("stated", [None, 3])
@pytest.mark.parametrize("entries", [MAX_ENTRIES + 1, 500_000])
def test_an_archive_of_very_many_entries_is_refused_before_it_is_parsed(
    entries: int, stated: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    make = zipfile.ZipInfo.__init__

    def counted(self: zipfile.ZipInfo, *arguments: Any, **options: Any) -> None:
        parsed.append(1)
        make(self, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipInfo, "__init__", counted)
    path = crowded(tmp_path / "x.npz", entries, stated)
    start = time.process_time()
    with pytest.raises(UserError) as caught, open_zip(path, KIND):
        pass
    assert (
        str(caught.value) == f"the SAE: {path} must be an archive of at most 1,000 entries; it has more. It is no SAE."
    )
    assert len(parsed) < 6000
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(("name", "config"), [("params.npz", None), ("ae.pt", "config.json")])
def test_both_formats_of_archives_are_bounded(name: str, config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / config).write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    crowded(tmp_path / name, 100_000)
    with pytest.raises(UserError, match=r"must be an archive of at most 1,000 entries"):
        formats.read(tmp_path)


def test_as_many_entries_as_allowed_are_read(tmp_path: Path) -> None:
    with open_zip(crowded(tmp_path / "x.npz", MAX_ENTRIES), KIND) as archive:
        assert len(archive.infolist()) == MAX_ENTRIES


def test_a_size_that_a_header_claims_is_not_allocated(tmp_path: Path) -> None:
    """The directory of 4 GB that an archive of 100 bytes claims to have."""
    path = crowded(tmp_path / "x.npz", 1)
    content = bytearray(path.read_bytes())
    content[-10:-6] = b"\xff\xff\xff\xfe"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"), open_zip(path, KIND):
        pass


def peak_bytes() -> int:
    """Return the largest resident memory since it was last reset."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


D_IN, D_SAE = 256, 2**15
"""A matrix of float32 has 32 MB: at that size, freed memory is given back and not used again unseen."""

NUMBERS = 2 * D_IN * D_SAE


def big_npz(folder: Path, dtype: str) -> None:
    shapes: dict[str, Any] = {"W_enc": (D_IN, D_SAE), "b_enc": D_SAE, "W_dec": (D_SAE, D_IN), "b_dec": D_IN}
    arrays: dict[str, Any] = {name: np.ones(shape, dtype) for name, shape in (shapes | {"threshold": D_SAE}).items()}
    np.savez(folder / "params.npz", **arrays)


def big_pt(folder: Path, dtype: str) -> None:
    (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    rows, numbers = torch.ones(D_SAE, D_IN), {"f4": torch.float32, "f2": torch.float16, "f8": torch.float64}
    state = {"encoder.weight": rows, "encoder.bias": rows[:, 0], "decoder.weight": 2 * rows.T, "bias": rows[0]}
    torch.save({name: one.clone().to(numbers[dtype]) for name, one in state.items()}, folder / "ae.pt")


@pytest.mark.parametrize(("write", "dtype"), [(big_npz, "f4"), (big_npz, "f2"), (big_pt, "f4"), (big_pt, "f8")])
def test_reading_takes_no_more_memory_than_was_checked(
    write: Any, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the largest resident memory cannot be reset on this system")
    write(tmp_path, dtype)
    checked: list[int] = []
    monkeypatch.setattr(reading, "check_memory", lambda needed, *_: checked.append(needed))
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    sae = formats.read(tmp_path).sae
    taken = peak_bytes() - before
    assert sae.d_sae == D_SAE
    assert max(checked) == pytest.approx(READING_BYTES * NUMBERS, rel=0.01)
    assert taken < max(checked)
    if dtype == "f4":
        assert taken > max(checked) / 4  # the numbers in float32 alone are a third
