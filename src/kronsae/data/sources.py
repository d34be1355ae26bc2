"""Read documents from the bundled corpus, local files, the Hugging Face Hub, or memory."""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from kronsae.data.corpus import Document, standard_library_documents
from kronsae.data.hub import check_dataset, looks_like_path, one_line
from kronsae.data.model import BUNDLED
from kronsae.data.stream import State
from kronsae.support.errors import UserError, nearest

_T = TypeVar("_T")

TEXT_SUFFIXES = (".txt",)
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
JSON_SUFFIXES = (".json", ".json.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + LINE_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

MIN_CUT_CHARACTERS = 4096
# Text without blank lines is also cut here, because tokenising one document must fit into memory.
MAX_CUT_CHARACTERS = 65_536
PARQUET_ROWS = 1024


class Source(Protocol):
    """Documents in a fixed order that can be read from any position."""

    @property
    def name(self) -> str:
        """Return the name of the source for messages."""

    def read(self, position: State) -> Iterator[tuple[Document, State]]:
        """Yield the documents after ``position``, each with its own position; an empty position yields all."""


@dataclass(frozen=True)
class ListedSource:
    """A source that is cheap to read again; a position is the number of documents already read."""

    name: str
    documents: Callable[[], Iterable[Document]]

    def read(self, position: State) -> Iterator[tuple[Document, State]]:
        start = position.get("document", 0)
        for number, document in enumerate(itertools.islice(self.documents(), start, None), start + 1):
            yield document, {"document": number}


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set on the Hugging Face Hub; streaming resumes without reading the preceding documents."""

    name: str
    subset: str | None
    split: str
    column: str
    revision: str | None
    streaming: bool

    def read(self, position: State) -> Iterator[tuple[Document, State]]:
        start = position.get("document", 0)
        dataset = self._load()
        if not self.streaming:
            dataset = dataset.skip(start)
        elif start > 0:
            dataset.load_state_dict(position["source"])
        rows = enumerate(_hub_rows(dataset, self.name), start + 1)
        for number, row in rows:
            text = column_of(row, self.column, f"data set '{self.name}'")
            state: State = {"document": number}
            if self.streaming:
                state["source"] = dataset.state_dict()
            yield document_of(text), state

    def _load(self) -> Any:
        import datasets

        if self.streaming:
            check_dataset(self.name, self.revision)
        # Loading scripts are never run: datasets 4 does not support them, and datasets 3 needs the argument.
        major = int(datasets.__version__.split(".")[0])
        no_scripts = {"trust_remote_code": False} if major < 4 else {}
        try:
            return datasets.load_dataset(
                self.name,
                self.subset,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
                **no_scripts,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"text: data set '{self.name}' (subset {self.subset!r}, split '{self.split}') cannot be "
                f"loaded: {one_line(error)}."
            ) from error


def _hub_rows(dataset: Any, name: str) -> Iterator[Mapping[str, object]]:
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the transport may raise any exception while streaming
            raise UserError(f"text: reading data set '{name}' failed: {one_line(error)}.") from error
        if row is None:
            return
        yield row


def open_local(path: Path, column: str) -> ListedSource:
    """Return a source with the documents of a file, or of all text files in a folder and its subfolders.

    A single ``.txt`` file is cut into documents at blank lines. In a folder each ``.txt`` file is one document. Every
    row of a ``.jsonl``, ``.json`` or ``.parquet`` file is one document.
    """
    if path.is_dir():
        files = [p for p in path.rglob("*") if _has_suffix(p, SUFFIXES) and _is_visible(p, path)]
        files = mixed(files, lambda file: file.relative_to(path).as_posix())
        texts = partial(_folder_texts, files, column)
    else:
        files = [path] if _has_suffix(path, SUFFIXES) else []
        texts = partial(_file_texts, path, column)
    if not files:
        raise UserError(
            f"text: a source must be or contain files that end in {', '.join(SUFFIXES)}; found none in "
            f"'{path}'. Rename the file, or give another one."
        )
    return ListedSource(str(path), lambda: map(document_of, texts()))


@functools.cache  # thousands of files, which would be read again in every epoch and for the held-out part
def bundled_documents() -> list[Document]:
    """Return the standard library's documents, shuffled so that those of one package are not consecutive."""
    return mixed(standard_library_documents(), lambda document: document.id)


def mixed(items: Iterable[_T], name: Callable[[_T], str]) -> list[_T]:
    """Return the items sorted by a digest of the name: a shuffled order that is the same on every machine."""
    return sorted(items, key=lambda item: (_digest(name(item)), name(item)))


def document_of(text: str) -> Document:
    """Return a document whose id is the BLAKE2b digest of its text.

    Equal texts have equal ids, so that a copy of a training document is never held out.
    """
    return Document(id=_digest(text), text=text)


def column_of(row: Mapping[str, object], column: str, place: str) -> str:
    """Return the text in a column of a row, and ``""`` for None.

    Raises:
        UserError: If the row has no such column, or the column does not contain text.
    """
    if column not in row:
        raise UserError(
            f"column must be one of the columns of {place}: {', '.join(row)}; got '{column}'." + nearest(column, row)
        )
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"column must contain text; column '{column}' of {place} contains {type(value).__name__}. "
            f"Choose among {', '.join(row)}."
        )
    return value


def _folder_texts(files: list[Path], column: str) -> Iterator[str]:
    for file in files:
        if _has_suffix(file, TEXT_SUFFIXES):
            with _open_text(file) as lines:
                yield lines.read()
        else:
            yield from _file_texts(file, column)


def _file_texts(path: Path, column: str) -> Iterator[str]:
    if _has_suffix(path, TEXT_SUFFIXES):
        with _open_text(path) as lines:
            yield from cut(lines)
        return
    read = _parquet_rows if _has_suffix(path, PARQUET_SUFFIXES) else _json_rows
    for row in read(path, column):
        yield column_of(row, column, f"'{path}'")


def cut(lines: IO[str]) -> Iterator[str]:
    """Yield pieces of a text, cut at the first blank line after ``MIN_CUT_CHARACTERS`` or at ``MAX_CUT_CHARACTERS``."""
    piece: list[str] = []
    size = 0
    for line in iter(partial(lines.readline, MAX_CUT_CHARACTERS), ""):
        piece.append(line)
        size += len(line)
        at_paragraph = not line.strip() and size >= MIN_CUT_CHARACTERS
        if at_paragraph or size >= MAX_CUT_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _json_rows(path: Path, column: str) -> Iterator[Mapping[str, object]]:
    with _open_text(path) as lines:
        if _has_suffix(path, JSON_SUFFIXES):
            content = lines.read()
            whole = _json_or_none(content)
            # Many .json files are JSON lines: content that is not one list is read as lines.
            rows = whole if isinstance(whole, list) else _json_lines(content.splitlines(), path)
        else:
            rows = _json_lines(lines, path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(
                    f'text: every row must be a JSON object such as {{"{column}": "..."}}; row {number} '
                    f"of '{path}' is of type {type(row).__name__}. Wrap each text in an object."
                )
            yield row


def _json_lines(lines: Iterable[str], path: Path) -> Iterator[object]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"text: line {number} of '{path}' must be JSON; {error.msg} at column {error.colno}. "
                "Correct or remove the line."
            ) from error


def _json_or_none(content: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        return None


def _parquet_rows(path: Path, column: str) -> Iterator[Mapping[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = dict.fromkeys(file.schema_arrow.names)
            if column not in columns:
                column_of(columns, column, f"'{path}'")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"text: '{path}' must be a Parquet file; {one_line(error)}.") from error


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    """Open UTF-8 text, plain or gzip, with or without a byte-order mark; raise a UserError for anything else."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise UserError(
            f"text: '{path}' must be UTF-8 text; byte {error.start} is invalid. Convert the file."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"text: '{path}' must be a complete gzip file; {error}.") from error
    except OSError as error:
        raise UserError(f"text: '{path}' cannot be read: {error.strerror}.") from error


def open_named(
    source: str, *, subset: str | None, split: str, column: str, revision: str | None, streaming: bool
) -> Source:
    """Return the source with a name: ``"bundled"``, an existing local path, or otherwise a Hub data set."""
    if source == BUNDLED:
        return ListedSource("the Python standard library", bundled_documents)
    path = Path(source).expanduser()
    if path.exists():
        return open_local(path, column)
    if looks_like_path(source) or source.endswith(SUFFIXES):
        raise UserError(f"text: a path must exist; '{source}' does not. Check it, or give a Hub data set.")
    return HubSource(name=source, subset=subset, split=split, column=column, revision=revision, streaming=streaming)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _is_visible(path: Path, root: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
