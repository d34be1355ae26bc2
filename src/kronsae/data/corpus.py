"""Text that every machine with Python already has: the standard library's sources.

The bundled language model is trained on these documents, and its held-out figures can be repeated
on any machine because the split depends on nothing but a document's name.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HASH_BYTES = 8
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """One text with a name that is the same on every machine.

    Args:
        id: Name of the document, such as ``"python-stdlib/json/decoder.py"``.
        text: Its whole text.
    """

    id: str
    text: str


def is_held_out(document_id: str, share: float = 0.05) -> bool:
    """Whether a document belongs to the held-out part of a corpus.

    Formula: ``blake2b_64(document_id) / 2**64 < share``, with the 8-byte digest of the UTF-8 name
    read as a big-endian integer. The answer depends on the name alone, so that the split is the
    same on every machine and in every Python version, and a larger share contains a smaller one.

    Args:
        document_id: Name of the document.
        share: Expected share of documents held out, from 0 (none) to 1 (all).

    Returns:
        True where the document must stay out of training.

    Raises:
        ValueError: If ``share`` lies outside [0, 1].

    Example:
        >>> is_held_out("python-stdlib/abc.py", share=0.0)
        False
        >>> is_held_out("python-stdlib/abc.py", share=1.0)
        True
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie between 0 and 1; got {share}. Give 0.05 for 5 %.")
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") < share * 2.0 ** (8 * _HASH_BYTES)


def standard_library_documents(include_tests: bool = False) -> Iterator[Document]:
    """Yield the Python sources of the running interpreter's standard library.

    Documents come in the order of their POSIX relative paths. Installed packages are left out, and
    so are files that are empty or not UTF-8.

    Args:
        include_tests: Also yield what lies in folders named ``test``, ``tests`` or ``idle_test``.
            Off by default, since some distributions ship Python without them.

    Yields:
        Documents named ``"python-stdlib/" + relative path``.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _FOREIGN_FOLDERS if include_tests else _FOREIGN_FOLDERS | _TEST_FOLDERS
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in relative_paths if skipped.isdisjoint(path.parts[:-1]))
    for relative in sorted(kept, key=Path.as_posix):
        text = _read_or_none(root / relative)
        if text is not None:
            yield Document(id=f"python-stdlib/{relative.as_posix()}", text=text)


def _read_or_none(path: Path) -> str | None:
    """Return the text of a UTF-8 file; None where it is empty or cannot be decoded."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text or None
