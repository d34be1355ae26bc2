"""Atomic writing of files, so that a reader sees the old or the new one, and a lock for one writer per folder."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kronsae.support.errors import UserError

LOCK_FILE = ".lock"


def check_folder_place(folder: Path, argument: str = "out") -> None:
    """Raise if no folder can be created or written to at this path; its content is not checked."""
    if folder.is_dir():
        if not os.access(folder, os.W_OK):
            raise UserError(f"{argument} must be a writable folder; {folder} is not. Name another one.")
    elif folder.exists():
        raise UserError(f"{argument} must be a folder; {folder} is a file. Name another one.")
    else:
        above = next(path for path in folder.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(
                f"{argument} must be a folder that can be created; {folder} cannot be created in {above}. "
                "Name another one."
            )


def check_new_folder(folder: Path) -> None:
    """Raise if ``out`` cannot be created, or holds files: what is written there is a folder of its own."""
    check_folder_place(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"out must be a new or empty folder; {folder} holds files. Choose another one.")


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Write ``folder``, a new or empty one (`check_new_folder`), in the block; if the block fails, it is as before.

    Raises:
        UserError: it cannot be written.
    """
    existed = folder.exists()
    with writable(folder):
        try:
            yield
        except BaseException:
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            if not existed and folder.is_dir():
                folder.rmdir()
            raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and replaces ``path``.

    Raises:
        UserError: the disk is full or cannot be written to; ``path`` is as before.
    """
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writable(path: Path | str) -> Iterator[None]:
    """Turn an error of the disk in the block, which writes ``path``, into one sentence: a full disk, missing rights.

    Raises:
        UserError: an error of the operating system, also as safetensors reports it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{path}' must be writable; got {type(error).__name__} ({error}). Free space or correct the folder's "
            "rights, and run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_marked(path: Path, start: str, end: str, text: str) -> None:
    """Replace the text between two marks of a text file; everything else stays.

    Raises:
        UserError: a mark is missing.
    """
    before, found_start, rest = path.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise UserError(f"{path} must hold the marks '{start}' and '{end}', in this order. Put them back.")
    write_text(path, f"{before}{start}\n{text}\n{end}{after}")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON; NaN and infinity raise, because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys atomically as CSV; the keys are the header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, ``{"bytes", "sha256"}``."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def flush_folder(folder: Path) -> None:
    """Write the names of a folder's files to disk, so that they outlast a power cut; not on Windows."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_bytes(path: Path, what: str) -> int:
    """Return the size of a regular file, or of what a link to one leads to.

    Raises:
        UserError: it does not exist, or is a folder, a device or a pipe, which could be read from without end.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} cannot be read ({error}).") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what}: {path} must be a file; it is a {_kind(status.st_mode)}.")
    return status.st_size


def _kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"


def read_json(path: Path, what: str, *, max_bytes: int | None = None) -> Any:
    """Read JSON; a missing or damaged file raises `UserError`, where ``what`` says what the file is.

    Args:
        path: the file.
        what: what it is.
        max_bytes: largest size that is read; None: any.
    """
    return parse_json(read_bytes(path, what, max_bytes=max_bytes), path, what)


def read_bytes(path: Path, what: str, *, max_bytes: int | None = None) -> bytes:
    """Return the content of a file; see `read_json`."""
    size = file_bytes(path, what)
    if max_bytes is not None and size > max_bytes:
        raise UserError(f"{what}: {path} must have at most {max_bytes:,} bytes; it has {size:,}.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error}).") from None


def parse_json(content: bytes, path: Path, what: str) -> Any:
    """Return the JSON in the content of a file; see `read_json`."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON ({error}).") from None


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create the folder if needed and lock it for one writer until the end of the block.

    The lock ends with the process, however it ends. Folders that were created and are empty at the end are removed.
    If the system has no locks (Windows, some network drives), other writers are not blocked.

    Raises:
        UserError: another process holds the lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _lock(folder / LOCK_FILE)
    try:
        yield
    finally:
        with suppress(OSError):  # the file system has become read-only; a file without a lock does not matter
            (folder / LOCK_FILE).unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


def _lock(path: Path) -> int | None:
    """Return an open file with the lock; None if the system has no locks."""
    while True:
        with writable(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        import fcntl

        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the previous holder removed the folder again
            continue
        except PermissionError:  # the lock file belongs to another user
            return None
        except OSError as error:
            with writable(path):
                raise error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"out must be a folder without another writer; another kronsae process is writing to {path.parent}. "
                "Wait until it ends, or name another folder."
            ) from None
        except OSError:
            os.close(handle)
            return None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # the file was removed between opening and locking


def umask() -> int:
    """Return what this process takes from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
