"""Read the bundled corpus: the source files of Python's standard library, without generated tables.

The bundled language model is evaluated on these documents. Its held-out results can be reproduced on any machine,
because the split depends only on a document's name.

A fifth of the library's text is data rather than code: character tables, HTML entities, and the help topics as string
literals. Their lines differ only in numbers, names and strings, and would dominate statistics over the corpus.
`without_tables` detects them by their content.
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
"""Minimum number of rows with the same template in a document for these rows to count as near-copies, and number of
rows that are kept of a run of them."""
TABLE_SHARE = 0.5
"""A document is omitted if more than this share of its characters is in near-copied rows. In Python 3.10 to 3.13 the
share is above 0.8 for character tables and below 0.45 for modules of code."""

# ASCII, so that Python versions with different Unicode data find the same rows.
_TOKEN = re.compile(
    r"""((?:\b[bru]{1,2})?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))  # 1: a string
    | (\#.*)                                                        # 2: a comment
    | (\b\d[\w.]*)                                                  # 3: a number
    | ([^\W\d][\w.]*)                                              # 4: a name, dotted or not
    | (\s+)                                                         # 5: white space
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
_MASKS = ("", "S", "", "0", "x", "")  # by group number
_LITERAL = re.compile(r"""[\d'"]""", re.ASCII)
_STATEMENT = re.compile(
    r"\s*(?:assert|async|await|class|def|del|elif|else|except|finally|for|from|global|if|import|lambda|nonlocal"
    r"|raise|return|try|while|with|yield)\b",
    re.ASCII,
)
# Other characters, two adjacent names or numbers (prose), a second assignment, a second call.
_NOT_A_ROW = re.compile(r"[^][S0x(){}:,=.+\-*/|&^<>~%]|[x0][x0S]|S[x0]|=.*=|x\(.*x\(", re.ASCII)


@dataclass(frozen=True)
class Document:
    """One text with an id that is the same on every machine.

    Args:
        id: Id of the document, such as ``"python-stdlib/json/decoder.py"``.
        text: Text of the document.
    """

    id: str
    text: str


def is_held_out(document_id: str, share: float = 0.05) -> bool:
    """Return whether a document belongs to the held-out part of a corpus.

    Formula: ``blake2b_64(document_id) / 2**64 < share``, with the 8-byte digest of the UTF-8 id read as a big-endian
    integer. The result depends only on the id and the share, so that the split is the same on every machine and in
    every Python version. The held-out part of a larger share includes that of a smaller one.

    Args:
        document_id: Id of the document.
        share: Expected share of held-out documents, from 0 (none) to 1 (all).

    Returns:
        True if the document must not be used for training.

    Raises:
        ValueError: If ``share`` is outside [0, 1].

    Example:
        >>> is_held_out("python-stdlib/abc.py", share=0.0)
        False
        >>> is_held_out("python-stdlib/abc.py", share=1.0)
        True
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1; got {share}. Give 0.05 for 5%.")
    digest = hashlib.blake2b(document_id.encode("utf-8"), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") < share * 2.0 ** (8 * _HASH_BYTES)


def row_template(line: str) -> str | None:
    """Return the template of a line if it is a data row, and None otherwise.

    In the template strings are replaced by ``S``, numbers by ``0`` and names by ``x``; comments and white space are
    removed. A data row contains at least one string or number, and otherwise only names and punctuation: no statement
    keyword, at most one assignment and at most one call. Rows with the same template are near-copies of each other.

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
    """Return the text with long runs of near-copied rows shortened, or None if the whole text is a table.

    The text is a table if more than `TABLE_SHARE` of its characters are in rows whose template occurs at least
    `NEAR_COPIES` times in the text. White space around a line is not counted. Of consecutive rows with the same
    template the first `NEAR_COPIES` are kept. All other lines are unchanged.

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
    in_copies = sum(
        size
        for size, template in zip(sizes, templates, strict=True)
        if template is not None and counts[template] >= NEAR_COPIES
    )
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
    """Yield the Python source files of the running interpreter's standard library, sorted by POSIX relative path.

    Installed packages, empty files, files that are not UTF-8, and tables (see `without_tables`) are omitted. A
    document's id, and therefore its part of the split, does not depend on which files are omitted.

    Args:
        include_tests: Whether to include folders named ``test``, ``tests`` or ``idle_test``. The default is False,
            because some distributions of Python do not include them.
        include_tables: Whether to include tables and leave all texts unchanged.

    Yields:
        Documents with the id ``"python-stdlib/" + relative path``.
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
    """Return the text of a UTF-8 file, or None if it is empty or cannot be decoded."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text or None
