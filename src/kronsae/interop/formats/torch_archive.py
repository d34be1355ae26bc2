"""State dicts in the files of ``torch.save``, read without unpickling.

Such a file is a zip archive of a pickle, which says where each tensor lies, and of the tensors' bytes. The pickle is
not executed: its instructions are listed (`pickletools`), and the two dozen of a state dict are interpreted here on
plain values. ``torch.load(weights_only=True)`` executes no code either, but allocates what a file asks for: with torch
2.13, 300 bytes made it fill 1 GB (a call of ``bytearray``), and a key of nested tuples made it run without end.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from kronsae.interop.formats.reading import DAMAGE, check_reading, damage_of, damaged, open_zip
from kronsae.support.errors import shown_text

MAX_PICKLE_BYTES = 2**16
"""A state dict of 8 tensors takes 1,000 bytes."""

CHUNK_BYTES = 2**24

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}

GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in DTYPES),
}
"""What a state dict refers to; anything else is refused by name."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    numbers: int


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: type, shape, and where its numbers lie."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self.storage.dtype


@dataclass(frozen=True)
class TorchArchive:
    """An open file of ``torch.save``: its tensors by name, which `read` reads one by one."""

    path: Path
    archive: zipfile.ZipFile
    root: str
    tensors: Mapping[str, Stored]

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own.

        Raises:
            UserError: the file is damaged.
        """
        stored = self.tensors[name]
        storage = stored.storage
        try:
            record = self.archive.getinfo(f"{self.root}/data/{storage.record}")
            _check_record(record, storage.numbers * storage.dtype.itemsize)
            view = self._numbers(record).view(storage.dtype).as_strided(stored.shape, stored.stride, stored.offset)
            whole = view.is_contiguous() and view.numel() == storage.numbers
            return view if whole else view.clone(memory_format=torch.contiguous_format)
        except DAMAGE as error:
            raise damaged(self.path, f"{shown_text(name)}: {shown_text(error)}") from None

    def _numbers(self, record: zipfile.ZipInfo) -> Tensor:
        """Return the bytes of a record, which torch allocates once and aligned."""
        content = torch.empty(record.file_size, dtype=torch.uint8)
        into, start = content.numpy(), 0
        with self.archive.open(record) as file:
            while part := file.read(CHUNK_BYTES):
                into[start : start + len(part)] = np.frombuffer(part, np.uint8)
                start += len(part)
        if start != len(into):
            raise ValueError(f"the record {record.filename} is too short")
        return content


@contextmanager
def open_archive(path: Path) -> Iterator[TorchArchive]:
    """Open a file of ``torch.save`` that holds a state dict; no tensor is read yet.

    Raises:
        UserError: it is no such file, it is damaged, or its pickle holds anything but a state dict of tensors.
    """
    with open_zip(path, "a zip archive as torch.save writes since version 1.6") as archive:
        with damage_of(path):
            root = _root(archive)
            tensors = _state_dict(archive.read(f"{root}/data.pkl"))
            storages = {one.storage.record: one.storage for one in tensors.values()}.values()
            if sum(one.numbers * one.dtype.itemsize for one in storages) > path.stat().st_size:
                raise ValueError("its pickle names more numbers than it has bytes")
        check_reading(path, ((one.numbers,) for one in storages))
        yield TorchArchive(path, archive, root, tensors)


def _root(archive: zipfile.ZipFile) -> str:
    """Return the folder in the archive that holds everything; refuse what could be larger than it is in the file."""
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it has no single data.pkl")
    record = archive.getinfo(f"{roots[0]}/data.pkl")
    if record.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {record.file_size:,} bytes, more than the {MAX_PICKLE_BYTES:,} allowed")
    _check_record(record, record.file_size)
    if f"{roots[0]}/byteorder" in names:
        order = archive.getinfo(f"{roots[0]}/byteorder")
        _check_record(order, len("little"))
        if archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
    return roots[0]


def _check_record(record: zipfile.ZipInfo, size: int) -> None:
    """Refuse a record that is compressed, as torch.save writes none, or of another size."""
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise ValueError(f"the record {record.filename} is compressed")
    if record.file_size != size:
        raise ValueError(f"the record {record.filename} has {record.file_size:,} bytes in place of {size:,}")


def _state_dict(code: bytes) -> dict[str, Stored]:
    """Return the tensors of a pickled dictionary by name, also those that are wrapped in a Parameter."""
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(code):
        machine.step(instruction.name, argument)
    result = machine.pop()
    if not isinstance(result, dict) or not result or not all(isinstance(one, Stored) for one in result.values()):
        raise ValueError("it holds no state dict of tensors; save the SAE's state_dict()")
    return result


class _Machine:
    """Interprets the instructions of a pickled state dict on strings, numbers, tuples and dictionaries."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if name == "EMPTY_TUPLE" else int(name[-1])
                self.stack.append(tuple(self.pop() for _ in range(count))[::-1])
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "EMPTY_DICT":
                self.stack.append({})
            case "GLOBAL":
                if argument not in GLOBALS:
                    self.refuse(f"a reference to {str(argument).replace(' ', '.', 1)}")
                self.stack.append(_Global(argument.split(" ")[1]))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "BINPERSID":
                self.stack.append(_storage(self.pop()))
            case "REDUCE":
                arguments = self.pop()
                self.stack.append(_call(self.pop(), arguments))
            case "SETITEM" | "SETITEMS":
                items = self.pop_to_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
                _set_items(self.stack[-1], items)
            case "BUILD":  # attributes of an OrderedDict: the versions of the modules, of no use here
                self.pop()
            case _:
                self.refuse(f"the instruction {name}")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise ValueError("its pickle is damaged")
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"its pickle holds {what}; a state dict holds only tensors")


def _call(function: object, arguments: Any) -> Any:
    """Return what one of `GLOBALS` returns, as a description."""
    name = function.name if isinstance(function, _Global) else ""
    if name == "OrderedDict" and arguments == ():
        return {}
    if name == "_rebuild_parameter" and isinstance(arguments[0], Stored):
        return arguments[0]
    if name == "_rebuild_tensor_v2":
        storage, offset, shape, stride, *_ = arguments
        if isinstance(storage, _Storage) and _is_inside(storage.numbers, offset, shape, stride):
            return Stored(storage, offset, shape, stride)
    raise ValueError("its pickle is damaged: a tensor lies outside of its record")


def _is_inside(numbers: int, offset: Any, shape: Any, stride: Any) -> bool:
    """Whether a tensor lies in a storage, and is no larger: strides of 0 repeat numbers without end."""
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride) or len(shape) > 8:
        return False
    if not all(type(one) is int and one >= 0 for one in (offset, *shape, *stride)):
        return False
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return math.prod(shape) <= numbers and (0 in shape or last < numbers)


def _storage(identity: Any) -> _Storage:
    kind, storage, record, _location, numbers = identity
    right = kind == "storage" and isinstance(storage, _Global) and storage.name in DTYPES
    if not right or type(record) is not str or type(numbers) is not int or numbers < 0:
        raise ValueError("its pickle is damaged: a storage has no type, name or size")
    return _Storage(record, DTYPES[storage.name], numbers)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("its pickle is damaged")
    for key, item in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:  # a key of nested tuples would take exponential time to hash
            raise ValueError("its pickle holds keys that are no names")
        target[key] = item
