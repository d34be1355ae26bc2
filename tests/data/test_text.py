from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kronsae.data import sources
from kronsae.data.corpus import is_held_out
from kronsae.data.sources import MAX_CUT_CHARACTERS, MIN_CUT_CHARACTERS, HubSource, cut
from kronsae.data.text import TextConfig, TextStream
from kronsae.support.errors import UserError

TEXTS = [f"Document number {number} says {number * number}." for number in range(23)]


def write_lines(path: Path, opener: Callable[..., Any] = open) -> None:
    with opener(path, "wt") as file:
        file.writelines(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS))


def make_source(kind: str, folder: Path) -> Path:
    """Write ``TEXTS`` in one of the local formats; return the source."""
    if kind == "folder":
        (folder / "texts" / "deep").mkdir(parents=True)
        for number, text in enumerate(TEXTS):
            (folder / "texts" / ("deep" if number % 2 else ".") / f"{number}.txt").write_text(text)
        (folder / "texts" / "notes.md").write_text("not a text source")
        return folder / "texts"
    path = folder / f"texts.{kind}"
    if kind in ("jsonl", "json"):
        write_lines(path)
    elif kind == "jsonl.gz":
        write_lines(path, gzip.open)
    elif kind == "list.json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    elif kind == "parquet":
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=5)
    elif kind == "txt":
        path.write_text("".join(f"{text * 200}\n\n" for text in TEXTS))
    return path


KINDS = ("folder", "jsonl", "jsonl.gz", "json", "list.json", "parquet", "txt")


@pytest.mark.parametrize("kind", KINDS)
def test_every_local_format_gives_every_text_once(kind: str, tmp_path: Path) -> None:
    stream = TextStream(TextConfig(source=str(make_source(kind, tmp_path))), held_out_share=0.0, repeat=False)
    found = [document.text for document, _ in stream]
    expected = [f"{text * 200}\n\n" for text in TEXTS] if kind == "txt" else TEXTS
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_each_state_goes_on_exactly_after_its_document(kind: str, held_out: bool, tmp_path: Path) -> None:
    config = TextConfig(source=str(make_source(kind, tmp_path)))

    def ids(state: dict[str, Any] | None, count: int) -> list[tuple[str, dict[str, Any]]]:
        stream = TextStream(config, held_out=held_out, held_out_share=0.4, state=state)
        return [(document.id, state) for document, state in itertools.islice(stream, count)]

    whole = ids(None, 40)  # well into the second epoch or the third
    for at, (_, state) in enumerate(whole[:30]):
        restored = json.loads(json.dumps(state))
        assert ids(restored, 5) == whole[at + 1 : at + 6]


def test_the_two_sides_share_nothing_and_leave_nothing_out() -> None:
    sides = [
        {document.text for document, _ in TextStream(TEXTS, held_out=side, held_out_share=0.4, repeat=False)}
        for side in (False, True)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(TEXTS)


def test_copies_of_a_text_fall_on_one_side() -> None:
    stream = TextStream([*TEXTS, *TEXTS], held_out=True, held_out_share=0.4, repeat=False)
    texts = [document.text for document, _ in stream]
    assert len(texts) == 2 * len(set(texts))


def test_the_bundled_corpus_is_divided_by_name_and_mixed() -> None:
    stream = TextStream(TextConfig(), held_out=True, repeat=False)
    names = [document.id for document, _ in stream]
    assert names
    assert all(is_held_out(name, 0.05) for name in names)
    assert names != sorted(names)
    assert names == [document.id for document, _ in TextStream(TextConfig(), held_out=True, repeat=False)]


def test_blank_documents_and_empty_cells_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": null}\n\n{"text": "  \\n"}\n{"text": "something"}\n')
    stream = TextStream(TextConfig(source=str(path)), held_out_share=0.0, repeat=False)
    assert [document.text for document, _ in stream] == ["something"]


def test_the_column_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": 3, "body": "something"}\n')
    stream = TextStream(TextConfig(source=str(path), column="body"), held_out_share=0.0, repeat=False)
    assert [document.text for document, _ in stream] == ["something"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffsomething".encode())
    stream = TextStream(TextConfig(source=str(path)), held_out_share=0.0, repeat=False)
    assert [document.text for document, _ in stream] == ["something"]


def test_cutting_keeps_every_character_and_prefers_blank_lines() -> None:
    paragraph = "word " * 300 + "\n\n"
    text = paragraph * 10 + "x" * (3 * MAX_CUT_CHARACTERS) + "\nend"
    pieces = list(cut(io.StringIO(text)))
    assert "".join(pieces) == text
    assert all(MIN_CUT_CHARACTERS <= len(piece) < 2 * MAX_CUT_CHARACTERS for piece in pieces[:-1])
    assert pieces[0] == paragraph * 3


class FakeHub:
    """Replacement of ``datasets.load_dataset`` that reads local files and records its arguments."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.load = datasets.load_dataset
        self.asked: list[dict[str, Any]] = []
        self.files = [str(folder / f"{part}.parquet") for part in range(3)]
        for part, file in enumerate(self.files):
            pq.write_table(pa.table({"text": TEXTS[part::3]}), file, row_group_size=3)
        self.cache = str(folder / "cache")

    def __call__(self, name: str, subset: str | None, *, split: str, streaming: bool, **options: Any) -> Any:
        self.asked.append({"name": name, "subset": subset, "split": split, "streaming": streaming, **options})
        files = {split: self.files}
        return self.load("parquet", data_files=files, split=split, streaming=streaming, cache_dir=self.cache)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import datasets

    hub = FakeHub(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(sources, "check_dataset", lambda name, revision: None)
    datasets.disable_progress_bars()
    yield hub
    datasets.enable_progress_bars()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_goes_on_exactly_after_each_document(streaming: bool, fake_hub: FakeHub) -> None:
    config = TextConfig(source="some/set", subset="small", revision="v1", streaming=streaming)

    def ids(state: dict[str, Any] | None, count: int) -> list[str]:
        stream = TextStream(config, held_out_share=0.2, state=state)
        return [document.text for document, _ in itertools.islice(stream, count)]

    states = [state for _, state in itertools.islice(TextStream(config, held_out_share=0.2), 30)]
    whole = ids(None, 34)
    assert set(whole) <= set(TEXTS)
    assert len(whole) > len(set(whole))
    for at in (0, 1, 2, 5, 8, 17, 18, 19, 20, 29):
        assert ids(json.loads(json.dumps(states[at])), 4) == whole[at + 1 : at + 5]
    first = {"name": "some/set", "subset": "small", "split": "train", "streaming": streaming, "revision": "v1"}
    assert fake_hub.asked[0] == first


def test_a_hub_data_set_without_the_column_says_so(fake_hub: FakeHub) -> None:
    stream = TextStream(TextConfig(source="some/set", column="txt"))
    with pytest.raises(
        UserError,
        match=r"column must be one of the columns of data set 'some/set': text; got 'txt'\. Did you mean 'text'\?",
    ):
        next(iter(stream))


def test_a_hub_data_set_that_cannot_be_loaded_says_so(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ValueError("Bad split: trian.\nMore lines.")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        UserError, match=r"data set 'some/set' \(subset None, split 'trian'\) cannot be loaded: Bad split: trian\."
    ) as caught:
        next(iter(TextStream(TextConfig(source="some/set", split="trian"))))
    assert "\n" not in str(caught.value)


def test_no_network_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"there is no 'some/set' here, and the Hugging Face Hub cannot be reached"):
        next(iter(TextStream(TextConfig(source="some/set"))))


def test_loading_scripts_beside_the_data_are_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "scripted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    write_lines(folder / "texts.jsonl")
    assert next(iter(TextStream(TextConfig(source=str(folder)), held_out_share=0.0)))
    assert not marker.exists()


def read(source: Path | str, **options: Any) -> None:
    list(TextStream(TextConfig(source=str(source), **options), held_out_share=0.0, repeat=False))


@pytest.mark.parametrize("kind", ["jsonl", "list.json", "parquet"])
def test_an_unknown_column_names_the_nearest(kind: str, tmp_path: Path) -> None:
    path = make_source(kind, tmp_path)
    with pytest.raises(UserError, match=r"column must be one of .*text; got 'texts'\. Did you mean 'text'\?"):
        read(path, column="texts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2 of '.*a\.jsonl' must be JSON; Expecting value at column"),
        ("a.jsonl", b'["x"]\n', r"every row must be a JSON object such as .*; row 1 of .* is of type list"),
        ("a.jsonl", b'{"text": 3, "b": 1}', r"column 'text' of '.*a\.jsonl' contains int\. Choose among text, b"),
        ("a.json", b'{"text": ', r"line 1 of '.*a\.json' must be JSON"),
        ("a.txt", b"abc\xff\xfe", r"'.*a\.txt' must be UTF-8 text; byte 3 is invalid"),
        ("a.jsonl.gz", b"not gzip", r"'.*a\.jsonl\.gz' must be a complete gzip file"),
        # mtime=0 makes the test's name the same in all processes
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:20], r"must be a complete gzip file"),
        ("a.parquet", b"PAR1 nothing", r"'.*a\.parquet' must be a Parquet file"),
        ("a.txt", b"", r"a source must contain text; .*a\.txt has none"),
        ("a.txt", b"\n \n", r"a source must contain text; .*a\.txt has none"),
        ("a.csv", b"text\nx\n", r"files that end in \.txt, .*; found none in '.*a\.csv'"),
    ],
)
def test_an_unusable_file_is_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_texts_says_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(UserError, match=r"files that end in \.txt, \.jsonl, .*\.parquet; found none in"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/place", "missing.txt", "data/missing.jsonl"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(UserError, match=rf"text: a path must exist; '{source}' does not\."):
        read(source)


def test_an_empty_side_says_what_to_do() -> None:
    with pytest.raises(
        UserError,
        match=r"held-out part; got 0\.0, with which none of the 2 documents of the given texts is held out\. "
        r"Give more documents or a larger held_out_share\.",
    ):
        next(iter(TextStream(["a", "b"], held_out=True, held_out_share=0.0)))
    with pytest.raises(
        UserError, match=r"training part; got 1\.0, with which each of the 2 documents .* or a smaller held_out_share\."
    ):
        next(iter(TextStream(["a", "b"], held_out_share=1.0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one text", r"text must be a TextConfig or several strings; got one string\. Put it into a list\."),
        ((text for text in TEXTS), r"text must be iterable more than once; got a one-shot generator"),
        ([], r"a source must contain text; the given texts has none"),
        ([1, 2], r"text must contain only strings; got int"),
    ],
)
def test_unusable_texts_from_python(text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(iter(TextStream(text)))


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match=r"held_out_share must be from 0 to 1; got 1\.5"):
        TextStream(TEXTS, held_out_share=1.5)
    with pytest.raises(UserError, match=r"source must name a text; got ''"):
        TextConfig(source="")


def test_a_hub_source_is_what_is_left() -> None:
    assert isinstance(TextStream(TextConfig(source="HuggingFaceFW/fineweb-edu")).source, HubSource)
