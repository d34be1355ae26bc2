"""English text from NLTK's corpora: a small folder in their layout, and NLTK's own downloader."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from tests.command_line import Kronsae

from kronsae.data.english import CORPORA, Row, english_rows, labelled, read_rows, write_english, written
from kronsae.data.sources import mixed
from kronsae.support.errors import UserError

LONG = "Rain fell on the dry fields for a week and the farmers were glad of it. " * 4
FILES = {
    "brown/cats.txt": "ca01 news\ncb02 fiction\n",
    "brown/ca01": "\n\n\tThe/at Jury/nn-tl said/vbd ``/`` no/at evidence/nn ''/'' (/( it/pps)/pps )/) ./.\n\n"
    "\tThey/ppss did/dod n't/* ask/vb ./.\n",
    "brown/cb02": "Rain/nn-hl fell/vbd ./.\n" * 60,
    "brown/README": "not a document",
    "abc/rural.txt": f"{LONG}\n\n{LONG}",
    "movie_reviews/pos/cv000_1.txt": "a fine film , and well acted by all of those in it .\nsee it .\n",
    "movie_reviews/neg/cv000_2.txt": "dull from its first scene to the very last one of them .\n",
    "state_union/1945-Truman.txt": LONG,
    "inaugural/1789-Washington.txt": LONG,
    "webtext/wine.txt": f"{LONG}\n\n{LONG}\nshort\n",
}


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "corpora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "corpora"


def test_words_as_written_text() -> None:
    text, places = written(["``", "No", ",", "''", "he", "did", "n't", "(", "say", ")", ".", "$", "5"])
    assert text == '"No," he didn\'t (say). $5'
    words = ['"', "No", ",", '"', "he", "did", "n't", "(", "say", ")", ".", "$", "5"]
    assert [text[start:end] for start, end in places] == words


def test_documents(corpora: Path) -> None:
    rows: dict[str, list[Row]] = {}
    for row in english_rows(corpora):
        rows.setdefault(row["source"], []).append(row)
    news = rows["brown/ca01"][0]
    assert news["label"] == "news"
    assert news["text"].startswith('The Jury said "no evidence"')
    assert [news["text"][start:end] for start, end, tag in news["spans"] if tag == "NN"] == ["Jury", "evidence"]
    assert [news["text"][start:end] for start, end, tag in news["spans"] if tag == "*"] == ["n't"]
    assert [row["label"] for row in rows["movie_reviews/neg/cv000_2.txt"]] == ["neg"]
    assert rows["movie_reviews/pos/cv000_1.txt"][0]["text"].startswith("a fine film, and")
    assert len(rows["abc/rural.txt"]) == 1
    assert len(rows["webtext/wine.txt"]) == 2  # cut at the empty line; a new document has at least 200 characters
    assert set(FILES) - set(rows) == {"brown/cats.txt", "brown/README"}


def test_labels(corpora: Path) -> None:
    rows = list(english_rows(corpora))
    speech = list(labelled(rows, "parts-of-speech"))
    found = {(one["text"][s["start"] : s["end"]], s["label"]) for one in speech for s in one["spans"]}
    assert {("Jury", "noun, singular"), ("said", "verb, past"), ("They", "pronoun"), (".", "punctuation")} <= found
    assert not any(word == "n't" for word, _ in found)
    sentiment = list(labelled(rows, "sentiment"))
    assert [one["label"] for one in sentiment] == ["neg", "pos"]
    categories = list(labelled(rows, "categories"))
    assert {one["label"] for one in categories} == {"fiction"}  # the other document is shorter than a paragraph
    assert all(500 < len(one["text"]) < 520 for one in categories)
    splits = {one["held_out"] for one in categories}
    assert len(splits) == 1, "passages of a document are in one split"


def test_the_command_writes_the_same_file_twice_and_labels_from_it(
    corpora: Path, tmp_path: Path, kronsae: Kronsae
) -> None:
    digests = []
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        done = kronsae("texts", "english", "--nltk-data", corpora, "--out", tmp_path / name, "--json")
        assert done.status == 0
        assert "What now?" in done.err
        digests.append((done.json["sha256_of_lines"], (tmp_path / name).read_bytes()))
    assert digests[0] == digests[1]
    assert hashlib.sha256(gzip.decompress(digests[0][1])).hexdigest() == digests[0][0]
    assert list(read_rows(tmp_path / "one.jsonl.gz")) == mixed(english_rows(corpora), lambda row: str(row["text"]))
    out = tmp_path / "sentiment.jsonl"
    done = kronsae("texts", "labels", tmp_path / "one.jsonl.gz", "--name", "sentiment", "--out", out, "--json")
    assert done.json == {"out": str(out), "passages": 2, "labels": 2}
    assert {json.loads(line)["label"] for line in out.read_text().splitlines()} == {"pos", "neg"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["english", "--out", "x.txt"], "--out must end in .jsonl.gz, the format of the file; got x.txt."),
        (
            ["labels", "x", "--name", "sentimen", "--out", "y"],
            "--name must be one of parts-of-speech, categories, sentiment; got 'sentimen'. Did you mean 'sentiment'?",
        ),
    ],
)
def test_bad_arguments(words: list[str], sentence: str, kronsae: Kronsae) -> None:
    done = kronsae("texts", *words)
    assert (done.status, done.sentence) == (2, sentence)


def test_bad_files(corpora: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.gz").write_bytes(gzip.compress(b'{"text": "a", "source": "abc/rural.txt"}\n')[:-9])
    for path in (tmp_path / "none.gz", tmp_path / "damaged.gz"):
        with pytest.raises(UserError, match="it cannot be read"):
            list(read_rows(path))
    begin = f"{tmp_path / 'other.gz'} must be a file that `kronsae texts english` wrote; line 1"
    for row, rule in (
        ([], ' has no "text" and "source".'),
        ({"text": "a", "source": "brown/ca01", "label": "news"}, ', of brown, has no "spans".'),
        ({"text": "a", "source": "movie_reviews/pos/cv0.txt"}, ', of movie_reviews, has no "label".'),
    ):
        (tmp_path / "other.gz").write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode()))
        with pytest.raises(UserError) as caught:
            list(read_rows(tmp_path / "other.gz"))
        assert str(caught.value) == begin + rule
    (corpora / "abc" / "rural.txt").unlink()
    (corpora / "abc").rmdir()
    with pytest.raises(UserError, match="it has no abc"):
        write_english(corpora, tmp_path / "out.jsonl.gz")
    assert not (tmp_path / "out.jsonl.gz").exists()


@pytest.fixture
def index(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write what NLTK's public server offers, an index in XML and a zip file per corpus; return the index's address.

    The downloader refuses a server on this machine, so the address is that of a file.
    """
    place = tmp_path / "server"
    place.mkdir()
    packages = []
    for name in CORPORA:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted((corpora / name).rglob("*.*")) + sorted((corpora / name).glob("c[a-r]??")):
                archive.write(file, file.relative_to(corpora))
        content = packed.getvalue()
        (place / f"{name}.zip").write_bytes(content)
        packages.append(
            f'<package id="{name}" name="{name}" subdir="corpora" unzip="1" size="{len(content)}" '
            f'unzipped_size="{len(content)}" checksum="{hashlib.md5(content).hexdigest()}" '
            f'sha256_checksum="{hashlib.sha256(content).hexdigest()}" url="URL/{name}.zip"/>'
        )
    packed_index = f"<nltk_data><packages>{''.join(packages)}</packages><collections/></nltk_data>"
    (place / "index.xml").write_text(packed_index.replace("URL", place.as_uri()))
    monkeypatch.setenv("NLTK_DATA", str(place))  # NLTK reads file: addresses only below its data folders
    return (place / "index.xml").as_uri()


def test_download(index: str, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kronsae: Kronsae) -> None:
    monkeypatch.setenv("NLTK_DOWNLOAD_URL", index)
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "cache"))
    done = kronsae("texts", "english", "--out", tmp_path / "english.jsonl.gz")
    assert done.status == 0, done.err
    assert list(read_rows(tmp_path / "english.jsonl.gz")) == mixed(english_rows(corpora), lambda row: str(row["text"]))
    monkeypatch.setenv("NLTK_DOWNLOAD_URL", index.replace("index", "none"))
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "empty"))
    failed = kronsae("texts", "english", "--out", tmp_path / "again.jsonl.gz")
    assert failed.status == 2
    assert failed.sentence.startswith("the corpus 'brown' cannot be downloaded (")
    assert not (tmp_path / "again.jsonl.gz").exists()
