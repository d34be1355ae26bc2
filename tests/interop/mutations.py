"""Seeded damage to the folder of an SAE: what broken disks, other versions and hostile strangers leave there."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE: tuple[Any, ...] = (10**12, 10**400, -1, 2**63, 1e308, 0, -(10**12), 10**9)
"""Numbers for sizes."""

RETYPED: tuple[Any, ...] = (None, True, "x", 1.5, [], {}, [[]], "", "\ud800", float("nan"), float("inf"), {"a": [1]})
"""Values of other types; JSON as Python writes it has NaN and lone surrogates too."""

Mutation = Callable[[Path, random.Random, Path], None]
"""Damages a folder; the last path is a file that no reader may create."""


class Payload:
    """An object whose pickle would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def _files(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files that may be written to: what a link leads to belongs to somebody else."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    return [path for path in found if not suffixes or path.suffix in suffixes]


def flip_bytes(folder: Path, dice: random.Random, trap: Path) -> None:
    """Change 1 to 8 bytes of a file, more often in its first 300, where the headers are."""
    path = dice.choice(_files(folder))
    content = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 8)):
        reach = len(content) if dice.random() < 0.4 else min(300, len(content))
        text = path.suffix == ".json" and dice.random() < 0.9  # other bytes are no UTF-8, and end the reading early
        content[dice.randrange(reach)] = dice.randrange(32, 127) if text else dice.randrange(256)
    path.write_bytes(content)


def truncate(folder: Path, dice: random.Random, trap: Path) -> None:
    """Cut the end off a file, or append to it."""
    path = dice.choice(_files(folder))
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))] if dice.random() < 0.8 else content + dice.randbytes(99))


def edit_json(folder: Path, dice: random.Random, trap: Path) -> None:
    """Delete, duplicate, rename, retype or enlarge an entry of a config, at any depth."""
    paths = _files(folder, ".json")
    if not paths:
        return forge_archive(folder, dice, trap)
    path = dice.choice(paths)
    config = json.loads(path.read_text(encoding="utf-8"))
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(config)
    for _ in range(dice.randint(1, 3)):
        inside, key = dice.choice(places)
        match dice.randrange(6):
            case 0 if isinstance(inside, dict):
                inside.pop(key, None)
            case 1 if isinstance(inside, dict):
                inside[str(key) + dice.choice(["s", " ", "\x1b[2J", "\ud800", "x" * 10_000])] = dice.choice(RETYPED)
            case 2:
                inside[key] = dice.choice(HUGE)
            case 3:
                inside[key] = [dice.choice(HUGE)] * dice.randint(0, 50)
            case _:
                inside[key] = dice.choice(RETYPED)
    path.write_text(json.dumps(config), encoding="utf-8")
    return None


def odd_json(folder: Path, dice: random.Random, trap: Path) -> None:
    """Replace a config by other JSON, or by no JSON."""
    depth = dice.choice([900, 100_000])
    odd = ["", "null", "[]", '"cfg"', "{}", "[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, "1" * 5000]
    odd += ['{"sae": {}}', '{"trainer": {}}', "\x00", '{"k": 1, "k": 2}', "NaN", "\ufeff{}"]
    dice.choice(_files(folder, ".json") or _files(folder)).write_text(dice.choice(odd), encoding="utf-8")


def forge_header(folder: Path, dice: random.Random, trap: Path) -> None:
    """Rewrite the header of a safetensors file: other shapes, types, offsets and names."""
    paths = _files(folder, ".safetensors")
    if not paths:
        return flip_bytes(folder, dice, trap)
    path = paths[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    name = dice.choice(list(header))
    match dice.randrange(7):
        case 0:
            header[name]["shape"] = [dice.choice(HUGE) for _ in header[name]["shape"]]
        case 1:
            header[name]["dtype"] = dice.choice(["F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U8", "X", 3])
        case 2:
            header[name]["data_offsets"] = [dice.choice(HUGE), dice.choice(HUGE)]
        case 3:
            header[dice.choice(["../x", "", "W_dec", "a" * 300])] = header.pop(name)
        case 4:
            header[name]["shape"] = header[name]["shape"][::-1]
        case 5:
            header[name]["data_offsets"] = header[dice.choice(list(header))]["data_offsets"]
        case _:
            length = dice.choice([0, 2**40, 2**63, len(content), 7])
            path.write_bytes(length.to_bytes(8, "little") + content[8:])
            return None
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
    return None


def not_a_number(folder: Path, dice: random.Random, trap: Path) -> None:
    """Overwrite numbers at the end of the weights with NaN or infinity."""
    path = dice.choice(_files(folder, ".safetensors", ".pt", ".npz"))
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content) // 2, len(content) - 16) & ~3
    content[start : start + 8] = dice.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"]) * 2
    path.write_bytes(content)


def swap_files(folder: Path, dice: random.Random, trap: Path) -> None:
    """Exchange two files, or remove one."""
    one, other = dice.choices(_files(folder), k=2)
    if one == other:
        one.unlink()
        return
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def special_files(folder: Path, dice: random.Random, trap: Path) -> None:
    """Replace a file by a link (to nothing, itself, a device, a folder or another file), a pipe or a folder."""
    path = dice.choice(_files(folder))
    path.unlink()
    match dice.randrange(8):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case kind:
            path.symlink_to(["/dev/zero", "/dev/full", "/etc/hostname", "..", "../../nothing"][kind - 3])


def sparse_file(folder: Path, dice: random.Random, trap: Path) -> None:
    """Enlarge a file to hundreds of gigabytes that take no room on the disk."""
    path = dice.choice(_files(folder))
    with path.open("r+b") as file:
        file.truncate(dice.choice([2**33, 2**38, 2**42]))


def pickle_payload(folder: Path, dice: random.Random, trap: Path) -> None:
    """Replace a file by a pickle, plain or as torch.save and NumPy write it, that would create a file."""
    import numpy
    import torch

    path = dice.choice(_files(folder))
    content = io.BytesIO()
    match dice.randrange(4):
        case 0:
            pickle.dump(Payload(trap), content)
        case 1:
            torch.save({"encoder.weight": Payload(trap)}, content)
        case 2:
            torch.save(Payload(trap), content, _use_new_zipfile_serialization=False)
        case _:
            numpy.savez(content, W_enc=numpy.array([Payload(trap)], dtype=object))
    path.write_bytes(content.getvalue())


def forge_archive(folder: Path, dice: random.Random, trap: Path) -> None:
    """Rewrite a zip archive: compressed bombs, other sizes, a pickle that allocates, or that never ends."""
    paths = _files(folder, ".pt", ".npz")
    if not paths:
        return forge_header(folder, dice, trap)
    with zipfile.ZipFile(paths[0]) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(list(records))
    method = zipfile.ZIP_STORED
    code = next((one for one in records if one.endswith("data.pkl")), name)
    match dice.randrange(6):
        case 0:
            records[name], method = bytes(20_000_000), zipfile.ZIP_DEFLATED
        case 1:
            records[f"../{trap.name}"] = b"escaped"
        case 2:
            del records[name]
        case 3:  # numbers of a storage, sizes and strides are short integers: K is BININT1
            changed = bytearray(records[code])
            for _ in range(dice.randint(1, 4)):
                changed[dice.randrange(len(changed))] = dice.choice(b"K\x00\xff\x01tRQ2.")
            records[code] = bytes(changed)
        case 4:
            records[code] = pickle.dumps({"k": _Bytes(10**10)}, protocol=2)
        case _:
            records[code] = _nested_key(40)
    with zipfile.ZipFile(paths[0], "w", method) as archive:
        for record, packed in records.items():
            archive.writestr(record, packed)
    return None


class _Bytes:
    """An object whose pickle allocates memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (self.size,))


def _nested_key(levels: int) -> bytes:
    """Return the pickle of a dictionary whose key takes 2^levels steps to hash."""
    code = b"\x80\x02}("  # PROTO 2, EMPTY_DICT, MARK
    code += b")"  # EMPTY_TUPLE
    for _ in range(levels):
        code += b"q\x00h\x00\x86"  # BINPUT 0, BINGET 0, TUPLE2
    return code + b"K\x01u."  # BININT1 1, SETITEMS, STOP


MUTATIONS: dict[str, Mutation] = {
    one.__name__: one
    for one in (
        *(flip_bytes, truncate, edit_json, odd_json, forge_header, not_a_number, swap_files, special_files),
        *(sparse_file, pickle_payload, forge_archive),
    )
}
"""All kinds of damage, by name."""

LAST = {"special_files", "sparse_file"}

WEIGHTS = (4, 2, 5, 1, 3, 1, 1, 1, 0.5, 1, 2)
"""How often each is drawn."""


def mutated(source: Path, target: Path, seed: int, trap: Path) -> list[str]:
    """Copy a folder and damage the copy once or twice; return the kinds of damage."""
    dice = random.Random(seed)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    kinds = dice.choices(list(MUTATIONS), WEIGHTS, k=1 if dice.random() < 0.7 else 2)
    kinds.sort(key=LAST.__contains__)  # the other kinds read and write whole files
    done = []
    for kind in kinds:
        try:
            MUTATIONS[kind](target, dice, trap)
            done.append(kind)
        except (ValueError, IndexError, KeyError, TypeError, OSError, zipfile.BadZipFile, RecursionError):
            if not done:
                raise  # the first damage is to a whole folder, on which every kind works
    return done
