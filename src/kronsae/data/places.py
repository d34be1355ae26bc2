"""Folders of activations on a local disk or behind any URL that fsspec opens (``s3://``, ``gs://``, ``memory://``)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kronsae.support.cache import cache_root
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path, check_folder_place, folder_lock, writable
from kronsae.support.resources import check_disk, format_bytes

CACHE_VARIABLE = "KRONSAE_SHARD_CACHE_GB"
CACHE_GB = 64.0
"""Bound of the local copies of remote shards in GB (2^30 bytes), unless `CACHE_VARIABLE` gives another."""


@runtime_checkable
class Place(Protocol):
    """A folder of files without subfolders."""

    @property
    def url(self) -> str | None:
        """URL of a remote folder, None for a local one."""
        ...

    def __str__(self) -> str: ...

    def name_of(self, file: str) -> str:
        """Return path or URL of a file."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files, by name; empty if the folder does not exist."""
        ...

    def read(self, file: str) -> bytes:
        """Return the content of a small file."""
        ...

    def write(self, file: str, fill: Callable[[Path], object]) -> None:
        """Write a file that ``fill`` writes to the path that it is given; a reader sees all of it or nothing."""
        ...

    def remove(self, file: str) -> None:
        """Remove a file."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder for one writer."""
        ...

    def check(self, needed_bytes: int) -> None:
        """Raise if the folder cannot be written to, or there is no room for so many bytes."""
        ...

    def local(self, file: str, size: int, digest: str) -> Path:
        """Return a path on this machine with the file's content, which is copied there if it is remote."""
        ...


def open_place(place: Path | str) -> Place:
    """Return the folder at a local path or URL; nothing is created.

    Raises:
        UserError: The URL's protocol is unknown, or the package for it is missing.
    """
    if "://" not in str(place):
        return LocalPlace(Path(place))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = url_to_fs(str(place))
    except (ValueError, ImportError, OSError) as error:
        raise UserError(
            f"a folder of activations must be a local path or a URL that fsspec opens; got '{place}' ({error}). "
            "Correct it, or install the package for it."
        ) from None
    return LocalPlace(Path(path)) if isinstance(system, LocalFileSystem) else RemotePlace(str(place), system, path)


class LocalPlace:
    """A folder on a local disk; implements `Place`."""

    url: str | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def name_of(self, file: str) -> str:
        return str(self._folder / file)

    def sizes(self) -> dict[str, int]:
        if not self._folder.is_dir():
            return {}
        with os.scandir(self._folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}

    def read(self, file: str) -> bytes:
        return (self._folder / file).read_bytes()

    def write(self, file: str, fill: Callable[[Path], object]) -> None:
        with atomic_path(self._folder / file) as temporary:
            fill(temporary)

    def remove(self, file: str) -> None:
        (self._folder / file).unlink(missing_ok=True)

    def lock(self) -> AbstractContextManager[None]:
        return folder_lock(self._folder)

    def check(self, needed_bytes: int) -> None:
        check_folder_place(self._folder)
        check_disk(self._folder, needed_bytes, "the activations", "Harvest fewer tokens, or in dtype bfloat16 or int8.")

    def local(self, file: str, size: int, digest: str) -> Path:
        return self._folder / file


class RemotePlace:
    """A folder behind a URL; implements `Place`.

    Files are uploaded and downloaded as a whole. Downloaded shards are kept in ``activations`` in the cache of kronsae,
    up to a bound for all URLs; the least recently used ones make room for others. A URL has no lock: two harvests into
    one URL at a time are not noticed.
    """

    def __init__(self, url: str, system: Any, path: str) -> None:
        self.url: str | None = url
        self._system = system
        self._path = path.rstrip("/")

    def __str__(self) -> str:
        return str(self.url)

    def name_of(self, file: str) -> str:
        return f"{str(self.url).rstrip('/')}/{file}"

    def sizes(self) -> dict[str, int]:
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._failed(error) from error
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, file: str) -> bytes:
        try:
            return bytes(self._system.cat_file(f"{self._path}/{file}"))
        except OSError as error:
            raise self._failed(error) from error

    def write(self, file: str, fill: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory(prefix="kronsae-") as folder:
            temporary = Path(folder) / file
            with writable(temporary):
                fill(temporary)
            try:
                self._system.makedirs(self._path, exist_ok=True)
                self._system.put_file(str(temporary), f"{self._path}/{file}")
            except OSError as error:
                raise self._failed(error) from error

    def remove(self, file: str) -> None:
        self._system.rm_file(f"{self._path}/{file}")

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self, needed_bytes: int) -> None:
        """Check nothing: a URL tells neither its free space nor its rights before the first write."""

    def local(self, file: str, size: int, digest: str) -> Path:
        """Return the copy in the cache, downloaded if it is not there; its content is not checked."""
        folder = cache_root() / "activations"
        path = folder / f"{hashlib.sha256(self.name_of(file).encode()).hexdigest()[:16]}-{digest[:16]}.safetensors"
        if path.exists():
            os.utime(path)
            return path
        check_folder_place(folder, "KRONSAE_CACHE")
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, size)
        check_disk(folder, size, "a shard", "Free space, or name another folder with KRONSAE_CACHE.")
        with atomic_path(path) as temporary:
            try:
                self._system.get_file(f"{self._path}/{file}", str(temporary))
            except OSError as error:
                raise self._failed(error) from error
        return path

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"'{self.url}' must be readable or writable; got {type(error).__name__} ({error}). Try again.")


def cache_bytes() -> int:
    """Return the bound of the local copies of remote shards."""
    given = os.environ.get(CACHE_VARIABLE, "")
    try:
        size = float(given) if given else CACHE_GB
    except ValueError:
        size = -1.0
    if not 0 < size < float("inf"):
        raise UserError(f"{CACHE_VARIABLE} must be a number of GB above 0; got '{given}'.")
    return int(size * 2**30)


def check_cache(place: Place, needed_bytes: int) -> None:
    """Raise if a remote folder is larger than the local copies may be, so that reading it at random would thrash."""
    if place.url is not None and needed_bytes > (bound := cache_bytes()):
        raise UserError(
            f"activations that are read in random order must fit into the local cache; {place} has "
            f"{format_bytes(needed_bytes)}, and {CACHE_VARIABLE} allows {format_bytes(bound)}. Raise it, copy the "
            "folder to a local disk, or give activation_order=harvested, which reads one shard after another."
        )


def _make_room(folder: Path, size: int) -> None:
    """Remove the least recently used copies until another of ``size`` bytes is within the bound."""
    kept = [(path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.safetensors")]
    used, bound = sum(entry[1] for entry in kept), cache_bytes()
    for _, own, path in sorted(kept):
        if used + size <= bound:
            return
        path.unlink(missing_ok=True)
        used -= own
