"""Writing files so that a reader sees either the old one or the new one, never half of one."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kronsae.errors import UserError


def check_folder_place(folder: Path) -> None:
    """Refuse a path at which no folder can be made or written to; what the folder holds is not looked at."""
    if folder.is_dir():
        if not os.access(folder, os.W_OK):
            raise UserError(f"out must be a folder that can be written to; {folder} can not. Name another one.")
    elif folder.exists():
        raise UserError(f"out must be a folder; {folder} is a file. Name another one.")
    else:
        above = next(path for path in folder.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"out must be a folder that can be made; {folder} can not, in {above}. Name another.")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and takes ``path``'s place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON; NaN and Inf are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows that share their keys atomically, under a heading of these keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path, what: str) -> Any:
    """Read JSON; a missing or damaged file is a `UserError` that says ``what`` the file was for."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON ({error}).") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
