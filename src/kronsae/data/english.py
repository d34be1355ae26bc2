"""English text from the public corpora of NLTK, with human labels: made once into one JSON-lines file.

Sources: the Brown corpus with categories and parts of speech, ABC news, movie reviews with sentiment, State of the
Union and inaugural addresses, and web text. NLTK's licences allow use in research; none of the text is part of this
package.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from kronsae.data.corpus import is_held_out
from kronsae.data.sources import mixed
from kronsae.support.errors import UserError
from kronsae.support.files import atomic_path

CORPORA = ("brown", "abc", "movie_reviews", "state_union", "inaugural", "webtext")
DOCUMENT_CHARACTERS = 4000
SHORTEST_CHARACTERS = 200
HELD_OUT_SHARE = 0.2
NO_SPACE_BEFORE = frozenset(".,;:?!)%'") | {"''", "n't", "'s", "'re", "'ll", "'ve", "'d", "'m"}
NO_SPACE_AFTER = frozenset("([$") | {"``"}

LABELS_OF = {"brown": ("label", "spans"), "movie_reviews": ("label",)}
"""Keys of a row besides ``text`` and ``source``, by corpus."""

Row = dict[str, Any]
LabelName = Literal["parts-of-speech", "categories", "sentiment"]

PARTS_OF_SPEECH = {
    "adjective": ("JJ", "JJR", "JJS", "JJT"),
    "adverb": ("RB", "RBR", "RBT", "RN", "QL", "QLP", "WRB", "WQL"),
    "conjunction": ("CC", "CS"),
    "determiner": ("AT", "DT", "DTI", "DTS", "DTX", "AP", "ABN", "ABX", "ABL", "WDT"),
    "modal verb": ("MD",),
    "noun, plural": ("NNS", "NRS"),
    "noun, proper": ("NP", "NPS"),
    "noun, singular": ("NN", "NR"),
    "number": ("CD", "OD"),
    "preposition": ("IN",),
    "pronoun": ("PN", "PP", "PPL", "PPLS", "PPO", "PPS", "PPSS", "WP", "WPO", "WPS", "EX"),
    "punctuation": (".", ",", ":", "(", ")", "--", "``", "''", "'"),
    "verb, base": ("VB", "BE", "DO", "HV"),
    "verb, past": ("VBD", "BED", "BEDZ", "DOD", "HVD"),
    "verb, participle": ("VBN", "VBG", "BEN", "BEG", "HVN", "HVG"),
    "verb, present": ("VBZ", "BEM", "BER", "BEZ", "DOZ", "HVZ"),
}
"""Classes of the Brown corpus's tags. Contractions, foreign words and the tags that are not listed have no class."""

CLASS_OF_TAG = {tag: name for name, tags in PARTS_OF_SPEECH.items() for tag in tags}


def download(folder: Path) -> Path:
    """Download the corpora that are missing with NLTK's downloader, which checks their digests; return their folder.

    Raises:
        UserError: NLTK is not installed, or a corpus cannot be downloaded.
    """
    missing = [name for name in CORPORA if not (folder / "corpora" / name).is_dir()]
    if missing and find_spec("nltk") is None:
        raise UserError(
            "nltk must be installed to download the corpora; it was not found. Install it with: pip install "
            "'kronsae[texts]', or give --nltk-data, a folder with the unpacked corpora."
        )
    for name in missing:
        from nltk.downloader import Downloader

        folder.mkdir(parents=True, exist_ok=True)
        said = io.StringIO()
        Downloader(server_index_url=os.environ.get("NLTK_DOWNLOAD_URL")).download(
            name, download_dir=str(folder), prefix="", print_error_to=said
        )
        if not (folder / "corpora" / name).is_dir():
            reason = " ".join(said.getvalue().split()).rstrip(".") or "NLTK gives no reason"
            raise UserError(f"the corpus '{name}' cannot be downloaded ({reason}). Check the network and try again.")
    return folder / "corpora"


def write_english(folder: Path, out: Path) -> tuple[int, int, str]:
    """Write the documents of the corpora in ``folder`` to the gzipped JSON-lines file ``out``.

    The documents of all corpora are mixed, in an order that is the same on every machine, so that every part of the
    file is a sample of all of them.

    Returns:
        Number of documents, number of characters, and SHA-256 of the uncompressed lines: the file's own digest would
        depend on the version of zlib.

    Raises:
        UserError: a corpus is missing.
    """
    missing = [name for name in CORPORA if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder} must hold the unpacked corpora {', '.join(CORPORA)}; it has no {missing[0]}.")
    digest, documents, characters = hashlib.sha256(), 0, 0
    with atomic_path(out) as temporary, temporary.open("wb") as file, gzip.GzipFile("", "wb", 9, file, 0) as packed:
        for row in mixed(english_rows(folder), lambda row: str(row["text"])):
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            packed.write(line)
            documents, characters = documents + 1, characters + len(row["text"])
    return documents, characters, digest.hexdigest()


def english_rows(folder: Path) -> Iterator[Row]:
    """Yield the documents: ``text``, ``source``, and where the corpus has them ``label`` and ``spans``.

    ``label`` is the category (Brown), or ``pos`` or ``neg`` (movie reviews). ``spans`` are ``[start, end, tag]`` by
    characters, with the tags of the Brown corpus without suffixes for titles and headlines.
    """
    yield from _brown(folder / "brown")
    yield from _files(folder, "abc", r"\n\s*\n")
    yield from _reviews(folder)
    yield from _files(folder, "state_union")
    yield from _files(folder, "inaugural")
    yield from _files(folder, "webtext", r"\n")


def written(words: Iterable[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return tokenised words as written text, and the characters ``start <= c < end`` of each word."""
    text, places, last = "", [], "("
    for word in words:
        shown = '"' if word in ("``", "''") else word
        if text and word not in NO_SPACE_BEFORE and last not in NO_SPACE_AFTER and not text.endswith("\n"):
            text += " "
        places.append((len(text), len(text) + len(shown)))
        text, last = text + shown, word
    return text, places


def _brown(folder: Path) -> Iterator[Row]:
    lines = (folder / "cats.txt").read_text(encoding="utf-8").splitlines()
    category = dict(line.split() for line in lines if line.strip())
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        text, spans = "", []
        for line in path.read_text(encoding="utf-8").split("\n"):
            tokens = [token.rsplit("/", 1) for token in line.split() if "/" in token]
            if not tokens:
                continue
            sentence, places = written(word for word, _ in tokens)
            for (_, tag), (start, end) in zip(tokens, places, strict=True):
                tag = tag.upper()
                spans.append([start + len(text), end + len(text), tag.split("-")[0].rstrip("*$") or tag])
            text += f"{sentence} "
        yield {"text": text, "source": f"brown/{path.name}", "label": category[path.name], "spans": spans}


def _reviews(folder: Path) -> Iterator[Row]:
    for path in sorted((folder / "movie_reviews").rglob("cv*.txt")):
        lines = path.read_text(encoding="utf-8").split("\n")
        text = "\n".join(written(line.split())[0] for line in lines).strip()
        yield {"text": text, "source": path.relative_to(folder).as_posix(), "label": path.parent.name}


def _files(folder: Path, name: str, border: str | None = None) -> Iterator[Row]:
    """Yield plain text files: whole, or cut at a regular expression.

    A document ends at the first border after `DOCUMENT_CHARACTERS`, at an empty part, and at the end of the file.
    """
    for path in sorted((folder / name).rglob("*.txt")):
        if path.name.startswith(("README", "CONTENTS")):
            continue
        whole = path.read_text(encoding="utf-8", errors="replace")
        block: list[str] = []
        parts = [whole] if border is None else re.split(border, whole)
        for number, part in enumerate(parts, 1):
            block.append(part)
            if number == len(parts) or not part or sum(map(len, block)) > DOCUMENT_CHARACTERS:
                text, block = "\n".join(block).strip(), []
                if len(text) > SHORTEST_CHARACTERS:
                    yield {"text": text, "source": path.relative_to(folder).as_posix()}


def labelled(rows: Iterable[Row], name: LabelName) -> Iterator[Row]:
    """Yield passages for ``--labels``: ``text``, ``label`` or ``spans``, and ``held_out``, a fifth of the documents.

    - ``parts-of-speech``: spans of the Brown corpus in the classes of `PARTS_OF_SPEECH`;
    - ``categories``: the paragraphs of the Brown corpus, each with its document's category;
    - ``sentiment``: the lines of the movie reviews, each with ``pos`` or ``neg``.

    All passages of a document are in the same split.
    """
    corpus = "movie_reviews/" if name == "sentiment" else "brown/"
    for row in rows:
        if not row["source"].startswith(corpus):
            continue
        held_out = is_held_out(row["source"], HELD_OUT_SHARE)
        if name == "parts-of-speech":
            spans = [
                {"start": start, "end": end, "label": CLASS_OF_TAG[tag]}
                for start, end, tag in row["spans"]
                if tag in CLASS_OF_TAG
            ]
            yield {"text": row["text"], "spans": spans, "held_out": held_out}
        else:
            for text in _paragraphs(row):
                yield {"text": text, "label": row["label"], "held_out": held_out}


def _paragraphs(row: Row) -> Iterator[str]:
    """Yield the lines of a review, or runs of whole sentences of about 500 characters of a Brown document."""
    if "spans" not in row:
        yield from (line.strip() for line in row["text"].split("\n") if len(line.strip()) > 40)
        return
    start = 0
    for _, end, tag in row["spans"]:
        if tag == "." and end - start > 500:
            yield row["text"][start:end].strip()
            start = end


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file that `write_english` wrote.

    Raises:
        UserError: the file cannot be read, or a line is not such a row.
    """
    where = f"{path} must be a file that `kronsae texts english` wrote"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not {"text", "source"} <= row.keys():
                    raise UserError(f'{where}; line {number} has no "text" and "source".')
                corpus = str(row["source"]).partition("/")[0]
                for key in LABELS_OF.get(corpus, ()):
                    if key not in row:
                        raise UserError(f'{where}; line {number}, of {corpus}, has no "{key}".')
                yield row
    except UserError:  # also a ValueError
        raise
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{where}; it cannot be read ({error}).") from None


def write_labels(path: Path, name: LabelName, out: Path) -> tuple[int, int]:
    """Write the passages of `labelled` as JSON lines; return the number of passages and of labels.

    Raises:
        UserError: the file cannot be read, or has no such labels.
    """
    passages = labelled(read_rows(path), name)
    first = next(passages, None)
    if first is None:
        raise UserError(f"{path} must have documents with {name}; it has none.")
    count, labels = 0, 0
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for passage in itertools.chain([first], passages):
            file.write(json.dumps(passage, ensure_ascii=False) + "\n")
            count, labels = count + 1, labels + len(passage.get("spans", [0]))
    return count, labels
