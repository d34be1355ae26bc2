"""Folders that are made once and kept for every later run: whole or not there, and checked whenever they are used."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kronsae.support.errors import UserError
from kronsae.support.files import check_folder_place, read_json, umask, write_json

VARIABLE = "KRONSAE_CACHE"
MANIFEST = "made.json"
CHUNK_BYTES = 2**20


def cache_root() -> Path:
    """Return ``$KRONSAE_CACHE``, or ``$XDG_CACHE_HOME/kronsae``, or ``~/.cache/kronsae``; it need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache")).expanduser().absolute() / "kronsae"


def is_whole(folder: Path) -> bool:
    """Whether `cached_folder` made ``folder`` and every file is as it was written then, by size and CRC-32."""
    try:
        files = read_json(folder / MANIFEST, "the cache")["files"]
        return bool(files) and all(_described(folder / name) == about for name, about in files.items())
    except (UserError, OSError, LookupError, TypeError, AttributeError):
        return False


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder`` as ``make`` filled it: as it is if it is whole, else made now.

    ``make`` is given a temporary folder beside, which takes the place of ``folder`` when all of it is on disk. Another
    process that wants the same folder meanwhile waits and uses it; where the system has no locks (Windows, some
    network drives) it makes its own, and one of the two stays.

    Raises:
        UserError: the cache cannot be written to. Whatever ``make`` raises leaves nothing behind.
    """
    if is_whole(folder):
        return folder
    check_folder_place(folder.parent, VARIABLE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as locked:
        if is_whole(folder):
            return folder
        if locked:  # nobody else is at work, so these were left behind by a process that was killed
            for left in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            make(temporary)
            files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
            described = {path.relative_to(temporary).as_posix(): _described(path) for path in files}
            write_json(temporary / MANIFEST, {"files": described})
            for path in files:
                _flush(path)
            _put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``, in the place of what is damaged; a whole one that is there stays."""
    temporary.chmod(0o777 & ~umask())
    while True:
        try:
            temporary.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if is_whole(folder):  # another process was quicker
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            folder.rename(aside / "damaged")
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _described(path: Path) -> dict[str, int]:
    """Size and CRC-32: against damage, not against intent; at 1 GB/s three times as fast as SHA-256."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _flush(path: Path) -> None:
    """On disk, and readable by whom the person's umask lets read; safetensors writes for the owner alone."""
    path.chmod(0o666 & ~umask())
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait until nobody else holds the lock of ``folder``, and hold it; yield whether there are locks here."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    with (folder.parent / f".{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True  # the end of the process, however it comes, ends the hold
