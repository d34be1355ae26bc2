"""Text that every machine with Python already has: the standard library's sources, without its tables.

The bundled language model is measured on these documents, and its held-out figures can be repeated
on any machine because the split depends on nothing but a document's name.

A fifth of the library's text is data rather than code: character tables, HTML entities, the help
topics as string literals. Their lines differ in nothing but numbers, names and strings, and
statistics over the corpus would be about them. `without_tables` finds them by what they hold.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HASH_BYTES = 8
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

NEAR_COPIES = 8
"""A row counts as part of a table where its document has at least so many rows of the same template; as many
stay of a run of them."""
TABLE_SHARE = 0.5
"""A document with more than this share of its characters in near-copied rows is left out. In Python 3.10 to 3.13
character tables lie above 0.8 and ordinary modules below 0.35."""

# ASCII, so that a Python with a newer Unicode finds the same rows.
_TOKEN = re.compile(
    r"""((?:\b[bru]{1,2})?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))  # 1: a string
    | (\#.*)                                                        # 2: a comment
    | (\b\d[\w.]*)                                                  # 3: a number
    | ([^\W\d][\w.]*)                                              # 4: a name, dotted or not
    | (\s+)                                                         # 5: blanks
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
_MASKS = ("", "S", "", "0", "x", "")  # by the number of the group
_LITERAL = re.compile(r"""[\d'"]""", re.ASCII)
_STATEMENT = re.compile(
    r"\s*(?:assert|async|await|class|def|del|elif|else|except|finally|for|from|global|if|import|lambda|nonlocal"
    r"|raise|return|try|while|with|yield)\b",
    re.ASCII,
)
# Other characters, two names or numbers side by side (prose), a second assignment, a second call.
_NOT_A_ROW = re.compile(r"[^][S0x(){}:,=.+\-*/|&^<>~%]|[x0][x0S]|S[x0]|=.*=|x\(.*x\(", re.ASCII)


@dataclass(frozen=True)
class Document:
    """One text with a name that is the same on every machine.

    Args:
        id: Name of the document, such as ``"python-stdlib/json/decoder.py"``.
        text: Its text.
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


def row_template(line: str) -> str | None:
    """Return a line of data without its content, or None for a line of any other kind.

    Strings become ``S``, numbers ``0`` and names ``x``; comments and blanks go. A row holds a string
    or a number and else only names and punctuation: no statement keyword, at most one assignment and
    one call. Two rows with the same template are near-copies of each other.

    Example:
        >>> row_template("    0x00b5: 0x00e6,     #  MICRO SIGN")
        '0:0,'
        >>> row_template("def_op('POP_TOP', 1)")
        'x(S,0)'
        >>> row_template("if n == 3:") is None
        True
    """
    if _LITERAL.search(line) is None or _STATEMENT.match(line) is not None:
        return None
    template = _TOKEN.sub(lambda token: _MASKS[token.lastindex or 0], line)
    if _NOT_A_ROW.search(template) is not None or not ("S" in template or "0" in template):
        return None
    return template


def without_tables(text: str) -> str | None:
    """Return the text with its long runs of near-copied rows cut, or None where it is a table as a whole.

    It is one if more than `TABLE_SHARE` of the characters lie in rows whose template occurs at least
    `NEAR_COPIES` times in the text; blanks around a line do not count. Of rows with the same template
    next to each other the first `NEAR_COPIES` stay; no other line is touched.

    Example:
        >>> without_tables("NAMES = {\\n" + "    'a': 1,\\n" * 30 + "}\\n") is None
        True
        >>> without_tables("if x:\\n" * 30) == "if x:\\n" * 30
        True
    """
    lines = text.split("\n")
    templates = [row_template(line) for line in lines]
    counts = Counter(template for template in templates if template is not None)
    sizes = [len(line.strip()) for line in lines]
    in_copies = sum(size for size, template in zip(sizes, templates, strict=True) if counts[template] >= NEAR_COPIES)
    if in_copies > TABLE_SHARE * sum(sizes):
        return None
    kept = []
    run, previous = 0, None
    for line, template in zip(lines, templates, strict=True):
        run = run + 1 if template is not None and template == previous else 1
        previous = template
        if run <= NEAR_COPIES:
            kept.append(line)
    return "\n".join(kept)


def standard_library_documents(include_tests: bool = False, include_tables: bool = False) -> Iterator[Document]:
    """Yield the Python sources of the running interpreter's standard library.

    Documents come in the order of their POSIX relative paths. Installed packages are left out, and
    so are files that are empty or not UTF-8, and tables (`without_tables`). A document's name, and
    with it its side of the split, does not depend on what is left out.

    Args:
        include_tests: Also yield what lies in folders named ``test``, ``tests`` or ``idle_test``.
            Off by default, since some distributions ship Python without them.
        include_tables: Yield every file, and each as it is.

    Yields:
        Documents named ``"python-stdlib/" + relative path``.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = _FOREIGN_FOLDERS if include_tests else _FOREIGN_FOLDERS | _TEST_FOLDERS
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in relative_paths if skipped.isdisjoint(path.parts[:-1]))
    for relative in sorted(kept, key=Path.as_posix):
        text = _read_or_none(root / relative)
        if text is not None and not include_tables:
            text = without_tables(text)
        if text is not None:
            yield Document(id=f"python-stdlib/{relative.as_posix()}", text=text)


def _read_or_none(path: Path) -> str | None:
    """Return the text of a UTF-8 file; None where it is empty or cannot be decoded."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text or None
