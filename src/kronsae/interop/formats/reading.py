"""Reading the files of strangers: configs, tensors and archives, with sizes compared before anything is allocated."""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from kronsae.core.checkpoint import MAX_CONFIG_BYTES
from kronsae.support.config import checked
from kronsae.support.errors import UserError, shown_text
from kronsae.support.files import file_bytes, read_json
from kronsae.support.resources import check_memory
from kronsae.support.tensors import FLOATS, TensorHeader, read_headers, read_tensors

V = TypeVar("V")

WHAT = "the SAE"

UNREADABLE = (SafetensorError, OSError, MemoryError)
"""What reading a safetensors file raises; MemoryError: it is too large to be mapped, such as a file of holes."""

DAMAGE = (
    *(ValueError, TypeError, LookupError, EOFError, OSError, OverflowError, RuntimeError, MemoryError),
    *(AttributeError, SyntaxError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
    tokenize.TokenError,  # of the header of an array that is no Python literal
)
"""What `zipfile`, `pickletools` and NumPy raise for damaged archives and what they hold."""

MAX_ENTRIES = 1000
"""Entries of an archive; those of an SAE have about 20."""

MAX_DIRECTORY_BYTES = 2**18
"""Bytes that are read to open an archive: its directory, and 64 kB in which its end record is looked for."""

READING_BYTES = 12
"""Memory per number while an SAE is read, whatever type the file has: its tensors in float32 take 4, copies of those
that are transposed or aligned up to 4 more; of float64 numbers, one matrix of two is held in both types, 4 more."""

REMEDY = "Free memory, or use a larger machine."


def read_config(path: Path) -> dict[str, Any]:
    """Return a config of at most 16 MB, which must be a JSON object."""
    found = read_json(path, WHAT, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(found, dict):
        raise UserError(f"{WHAT}: {path} must be a JSON object; it is a {type(found).__name__}.")
    return found


def value(config: Mapping[str, Any], key: str, hint: type[V], where: object, default: V | None = None) -> V:
    """Return a value of a config.

    Args:
        config: the config, or a part of it.
        key: its key.
        hint: its type.
        where: file (and place) of the config, for messages.
        default: value of a missing key; None: the key must be there.

    Raises:
        UserError: it is missing or of another type.
    """
    if key not in config:
        if default is None:
            raise UserError(f"{where}: {key} is missing.")
        return default
    return cast(V, checked(hint, config[key], f"{where}: {key}"))


def optional(config: Mapping[str, Any], key: str, hint: type[V]) -> V | None:
    """Return a value that only informs, such as the name of the model; None if it is missing or of another type."""
    found = config.get(key)
    return found if isinstance(found, hint) and not isinstance(found, bool) else None


def check_shapes(path: Path, headers: Mapping[str, TensorHeader], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of other names, shapes or types than those of a format.

    Raises:
        UserError: a tensor is missing, surplus, of another shape, or not of floating-point numbers.
    """
    found = {name: header.shape for name, header in headers.items()}
    if wrong := sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)):
        detail = "; ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong[:5])
        raise UserError(f"{path} does not fit its config ({detail}). Save or download the SAE again.")
    if others := sorted({header.dtype for header in headers.values()} - FLOATS.keys()):
        raise UserError(f"{path}: weights must be of type {', '.join(FLOATS)}; got {', '.join(others)}.")


def check_file(path: Path) -> int:
    """Return the size of a file that is no larger than the memory.

    Raises:
        UserError: it is larger, does not exist, or is no regular file.
    """
    size = file_bytes(path, WHAT)
    check_memory(size, f"{WHAT} {path}", REMEDY)
    return size


def check_reading(path: Path, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse tensors that do not fit into memory while they are read and converted, whatever type the file has.

    Raises:
        UserError: more than `READING_BYTES` per number are needed than there are.
    """
    check_memory(READING_BYTES * sum(map(math.prod, shapes)), f"reading {path}", REMEDY)


def headers_of(path: Path) -> dict[str, TensorHeader]:
    """Return type and shape of each tensor of a safetensors file that can be read in the memory there is."""
    check_file(path)
    try:
        headers = read_headers(path)
    except UNREADABLE as error:
        raise damaged(path, error) from None
    check_reading(path, (header.shape for header in headers.values()))
    return headers


def tensors_of(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file whose headers were checked."""
    try:
        return read_tensors(path, device)
    except UNREADABLE as error:
        raise damaged(path, error) from None


class _Counted(io.BufferedReader):
    """A file that gives no more than ``allowed`` bytes, until that is None; no read allocates more than the file has.

    `zipfile` parses the whole directory of an archive when it opens it: a file of a gigabyte may hold 20 million
    entries, which take 15 times as much memory.
    """

    allowed: int | None = MAX_DIRECTORY_BYTES

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(io.FileIO(path))
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self.size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if self.allowed is not None:
            self.allowed -= wanted
            if self.allowed < 0:
                raise _TooManyEntries
        return super().read(wanted)


class _TooManyEntries(Exception):
    pass


@contextmanager
def open_zip(path: Path, kind: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive of few entries; a larger directory is not parsed.

    Args:
        path: the archive, no larger than the memory.
        kind: what it must be, for messages: ``"a zip archive as NumPy writes"``.

    Raises:
        UserError: it is no such archive, it is damaged, or it has more than `MAX_ENTRIES` entries.
    """
    size = check_file(path)
    try:
        file = _Counted(path, size)
    except OSError as error:
        raise damaged(path, shown_text(error)) from None
    with file:
        try:
            archive = zipfile.ZipFile(file)
            if len(archive.infolist()) > MAX_ENTRIES:
                raise _TooManyEntries
        except _TooManyEntries:
            raise UserError(
                f"{WHAT}: {path} must be an archive of at most {MAX_ENTRIES:,} entries; it has more. It is no SAE."
            ) from None
        except DAMAGE as error:
            raise damaged(path, f"not {kind}: {shown_text(error)}") from None
        file.allowed = None
        with archive:
            yield archive


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for damaged archives, inside the block, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise damaged(path, shown_text(error)) from None


def damaged(path: Path, reason: object) -> UserError:
    """Return the error of a damaged file."""
    return UserError(f"{WHAT}: {path} is damaged ({reason}). Save or download it again.")
