"""JSON files with a checksum of themselves: every changed byte is noticed, files of earlier versions are read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kronsae.support.errors import UserError
from kronsae.support.sealed import read_sealed, sealed, unsealed, write_sealed

FIELDS = {"b": 1.5, "a": [1, "ü"], "none": None}


def test_round_trip(tmp_path: Path) -> None:
    write_sealed(tmp_path / "x.json", FIELDS)
    assert read_sealed(tmp_path / "x.json", "the file", ()) == FIELDS
    stored = json.loads((tmp_path / "x.json").read_text())
    assert list(stored) == ["b", "a", "none", "sha256"]
    assert sealed(stored) == sealed(FIELDS)  # a checksum of before is replaced


def test_every_change_is_noticed() -> None:
    content = sealed(FIELDS).encode()
    draw = random.Random(0)
    assert unsealed(content) == FIELDS
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        assert unsealed(bytes(flipped)) is None, place
        assert unsealed(content[:place]) is None, place
    assert unsealed(content + b" ") is None
    assert unsealed(b"[1]") is None


def test_the_file_and_the_remedy_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(sealed(FIELDS).replace("1.5", "2.5"))
    with pytest.raises(UserError) as caught:
        read_sealed(path, "the file", ())
    assert str(caught.value) == (
        f"the file: {path} is damaged: its content does not have the sha256 that it names. Restore it from a copy; or, "
        "if it was changed on purpose, remove its entry 'sha256'."
    )
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_sealed(path, "the file", ())


def test_a_file_without_a_checksum_is_read_if_all_its_keys_are_known(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(FIELDS))
    assert read_sealed(path, "the file", FIELDS) == FIELDS
    path.write_text(sealed(FIELDS).replace('"sha256"', '"sha257"'))
    with pytest.raises(UserError, match=r"^the file: .*x\.json has unknown keys sha257; remove them\.$"):
        read_sealed(path, "the file", FIELDS)
