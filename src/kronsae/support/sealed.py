"""JSON files that contain a SHA-256 of themselves, so that a change of any byte is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kronsae.support.errors import UserError, shown_text
from kronsae.support.files import parse_json, read_bytes, write_text

DIGEST = "sha256"


def sealed(fields: Mapping[str, Any]) -> str:
    """Return JSON with the SHA-256 of all other fields as its last one, in the place of an earlier one."""
    fields = {key: value for key, value in fields.items() if key != DIGEST}
    digest = hashlib.sha256(_text(fields).encode()).hexdigest()
    return _text({**fields, DIGEST: digest}) + "\n"


def unsealed(content: bytes) -> dict[str, Any] | None:
    """Return the fields of a `sealed` file without the digest; None if a byte differs from what was written."""
    try:
        fields = json.loads(content)
        del fields[DIGEST]
        return dict(fields) if sealed(fields).encode() == content else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a `sealed` file atomically."""
    write_text(path, sealed(fields))


def read_sealed(path: Path, what: str, keys: Collection[str], *, max_bytes: int | None = None) -> Any:
    """Return the content of a sealed file without its digest, or of one without a digest, as earlier versions wrote it.

    Args:
        path: the file.
        what: what it is, for messages.
        keys: the keys that a file without a digest may have. A digest whose name is damaged is none of them.
        max_bytes: largest size that is read; None: any.

    Raises:
        UserError: the file is missing, is no JSON, was changed after it was written, or has other keys.
    """
    content = read_bytes(path, what, max_bytes=max_bytes)
    found = parse_json(content, path, what)
    if not isinstance(found, dict):
        return found
    if DIGEST in found:
        if (fields := unsealed(content)) is None:
            raise UserError(
                f"{what}: {path} is damaged: its content does not have the {DIGEST} that it names. Restore it from a "
                f"copy; or, if it was changed on purpose, remove its entry '{DIGEST}'."
            )
        return fields
    if unknown := sorted(found.keys() - set(keys)):
        raise UserError(f"{what}: {path} has unknown keys {shown_text(', '.join(unknown))}; remove them.")
    return found


def _text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, allow_nan=False)
