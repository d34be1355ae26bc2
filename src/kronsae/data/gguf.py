"""GGUF files as models: dequantised once by transformers into the cache, and from then on loaded like any folder."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kronsae.data.hub import one_line
from kronsae.data.pretrained import load_pretrained, save_pretrained
from kronsae.support.cache import cache_root, cached_folder, is_whole
from kronsae.support.errors import UserError
from kronsae.support.resources import check_disk, format_bytes

SUFFIX = ".gguf"
FORMAT = 1
"""Of what is written into the cache; raised when that changes."""

PACKAGES = ("gguf", "accelerate")
"""What transformers needs besides itself to read GGUF: the extra ``gguf``."""

RESULT_DEPENDS_ON = ("transformers", "gguf")
"""Another version of these may dequantise to other weights, so it gets a cache entry of its own."""


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == SUFFIX


def find(path: Path, name: str) -> Path | None:
    """Return the GGUF file at a path: itself, or the only one in a folder that holds no model of another format.

    Raises:
        UserError: If the folder holds several.
    """
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file() and is_gguf(file))
    if len(files) > 1:
        raise UserError(
            f"model: folder '{name}' must hold one GGUF file; it holds {_in_words([file.name for file in files])}. "
            "Give the path of one of them."
        )
    return files[0] if files else None


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"model: '{file}' cannot be read: {error.strerror}.") from error


def dequantised(file: Path) -> Path:
    """Return a folder in the cache with the file's model in float32 as safetensors, and its tokenizer.

    The folder is named by the file's SHA-256 and by the versions that its content depends on. A damaged one is made
    again. stderr says once what is made, and how large it gets.

    Raises:
        UserError: If a package of the extra ``gguf`` is missing, the disk is too full, or transformers cannot read
            the file.
    """
    made_by = hashlib.sha256("; ".join([f"format {FORMAT}", *map(_with_version, RESULT_DEPENDS_ON)]).encode())
    folder = cache_root() / "dequantised" / f"{digest(file)[:32]}-{made_by.hexdigest()[:8]}"
    if is_whole(folder):
        return folder
    require_packages(file.name)
    needed_bytes = 4 * _count_weights(file)
    check_disk(folder.parent, needed_bytes, "the dequantised model", "Make room, or set KRONSAE_CACHE to another disk.")

    def make(into: Path) -> None:
        from kronsae.support.terminal import say

        say(f"Dequantising {file.name} to float32, once: {format_bytes(needed_bytes)} in {folder}")
        with _bars_on_terminals_only():
            loaded = load_pretrained(str(file), str(file.parent), torch.float32, gguf_file=file.name)
        save_pretrained(loaded, into)

    return cached_folder(folder, make)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Transformers shows how far it has come whatever its settings are; in a log file that is noise."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield


def require_packages(name: str) -> None:
    """Raise a UserError if a package of the extra ``gguf`` is missing, which ``name`` is to be read with."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise UserError(
            f"model: reading GGUF files such as '{name}' takes {_in_words(PACKAGES)}; {_in_words(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run pip install 'kronsae[gguf]'."
        )


def _count_weights(file: Path) -> int:
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(file)
        return sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"model: '{file}' must be a whole GGUF file; {one_line(error)}. Get it again.") from error


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"


def _in_words(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
