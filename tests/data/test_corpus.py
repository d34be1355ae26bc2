"""The standard library as a corpus: the same documents and the same split everywhere."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from kronsae.data import corpus
from kronsae.data.corpus import Document, is_held_out, standard_library_documents


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 1\n",
        "a.py": b"a = 1\n",
        "a/test/t.py": b"t = 1\n",
        "a/tests/u.py": b"u = 1\n",
        "idle_test/v.py": b"v = 1\n",
        "test.py": b"not a folder of tests\n",
        "empty.py": b"",
        "latin.py": b"# \xe9\n",
        "notes.txt": b"no Python\n",
        "site-packages/p.py": b"p = 1\n",
        "a/__pycache__/q.py": b"q = 1\n",
        "dist-packages/r.py": b"r = 1\n",
    }
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    return tmp_path


@pytest.mark.usefixtures("library")
def test_documents_are_sorted_sources_without_tests() -> None:
    documents = list(standard_library_documents())
    names = ["a.py", "a/z.py", "b.py", "test.py"]
    assert [document.id for document in documents] == [f"python-stdlib/{name}" for name in names]
    assert documents[0] == Document(id="python-stdlib/a.py", text="a = 1\n")


@pytest.mark.usefixtures("library")
def test_tests_come_when_asked_for() -> None:
    added = {d.id for d in standard_library_documents(include_tests=True)} - {
        d.id for d in standard_library_documents()
    }
    assert added == {f"python-stdlib/{name}" for name in ("a/test/t.py", "a/tests/u.py", "idle_test/v.py")}


def test_this_python_has_a_library() -> None:
    ids = [document.id for document in standard_library_documents()]
    assert ids == sorted(set(ids))
    assert "python-stdlib/json/decoder.py" in ids
    assert len(ids) > 100


def rows(count: int, form: str) -> str:
    return "".join(form.format(index) + "\n" for index in range(count))


CHARACTER_MAP = "decoding_table = (\n" + rows(64, "    '\\x{0:02x}'     #  0x{0:02X} -> SOME NAME OR OTHER") + ")\n"
CODE = "".join(
    f"def area_{index}(shape, scale={index}):\n"
    f'    """Return the area of a shape, number {index} of several."""\n'
    "    if shape is None:\n"
    f"        raise ValueError('no shape; give one of {index}')\n"
    f"    return scale * shape.width * shape.height + {index}\n\n"
    for index in range(30)
)
TABLES = {
    "character map": CHARACTER_MAP,
    "numbers to numbers": "decoding_map.update({\n" + rows(64, "    0x{0:04x}: 0x{0:03x}4,\t# SOME NAME") + "})\n",
    "names to strings": '"""Entities."""\n\nNAMES = {\n' + rows(64, "    'key{0}': '\\u00{0:02x}',") + "}\n",
    "prose in string literals": "topics = {'assert': 'The statement\\n'\n"
    + rows(64, "           'is one of {0} ways that are convenient to do it\\n'")
    + "}\n",
    "constants": "# Generated.\n" + rows(40, "TOKEN_{0} = {0}"),
    "calls of literals": "opmap = {}\n\n\ndef def_op(name, op):\n    opmap[name] = op\n\n\n"
    + rows(40, "def_op('SOME_NAME_{0}', {0})  # a comment"),
    "attributes to strings": "keys = {\n" + rows(40, "    _curses.KEY_A{0}: 'ka{0}',") + "    }\n",
    "numbers in lines": "DATA = [\n" + rows(40, "    {0}, -0.5e-{0}, 0x{0}, 1_000,") + "]\n",
}
KEPT = {
    "code": CODE,
    "branches": "def f(x):\n" + rows(40, "    if x == {0}:\n        return '{0}'"),
    "prose": '"""' + rows(40, "In version {0}, they did 'this' and 3 other things.") + '"""\n',
    "numbered comments": rows(40, "# {0}: 'what happened in this year'"),
    "nested calls": rows(40, "self.assertEqual(frobnicate({0}), '{0}')"),
    "imports": rows(40, "from module{0} import name{0}"),
    "a short table": "NAMES = {\n" + rows(corpus.NEAR_COPIES - 1, "    'key{0}': {0},") + "}\n",
    "lines of many kinds": "A = 1\nB = 'b'\nC = [1, 2]\nD = {'a': 1}\nE = -1\nF = (1,)\nG = A + 1\nH = A['b']\n",
    "nothing": "\n\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_left_out(name: str) -> None:
    assert corpus.without_tables(TABLES[name]) is None


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_table_stays_as_it_is(name: str) -> None:
    assert corpus.without_tables(KEPT[name]) == KEPT[name]


def test_a_table_inside_code_is_cut_to_its_first_rows() -> None:
    table = [f"    '.{index}': 'application/{index}',\n" for index in range(40)]
    text = CODE + "types_map = {\n" + "".join(table) + "    }\n" + CODE
    kept = CODE + "types_map = {\n" + "".join(table[: corpus.NEAR_COPIES]) + "    }\n" + CODE
    assert corpus.without_tables(text) == kept
    assert corpus.without_tables(kept) == kept


def test_a_row_of_another_kind_ends_a_run() -> None:
    table = "    'a': 1,\n" * corpus.NEAR_COPIES + "    # others\n" + "    'b': 2,\n" * corpus.NEAR_COPIES
    text = CODE + "types_map = {\n" + table + "    }\n"
    assert corpus.without_tables(text) == text


def test_a_document_of_half_a_table_stays() -> None:
    """The border: exactly the share stays, one character more goes."""
    table = "'a': 1,\n" * corpus.NEAR_COPIES
    code = "x" * (len("'a': 1,") * corpus.NEAR_COPIES)
    assert corpus.without_tables(table + code + "\n") == table + code + "\n"
    assert corpus.without_tables(table + code[:-1] + "\n") is None


@pytest.mark.parametrize(
    ("line", "template"),
    [
        ("    0x0041: 0x004e,", "0:0,"),
        ("    u'\\xa0'   #  0x20 -> NO-BREAK SPACE (don't)", "S"),
        ("    'it''s', \"a # b\", b'\\''", "SS,S,S"),
        ("    re.compile(r'\\d'): -1_0.5e3,", "x(S):-0,"),
        ("ST_MODE  = 0", "x=0"),
        ("x = y = 0", None),
        ("f(g(1), 2)", None),
        ("return 1", None),
        ("returned = 1", "x=0"),
        ("in 3 of 4 cases", None),
        ("name", None),
        ("# 1, 2, 3", None),
        ("'unfinished, 1", None),
        ("élan = 1", None),
        ("", None),
    ],
)
def test_template_of_a_row(line: str, template: str | None) -> None:
    assert corpus.row_template(line) == template


def test_tables_go_from_the_library_and_come_when_asked_for(library: Path) -> None:
    (library / "encodings").mkdir()
    (library / "encodings" / "cp0.py").write_text(CHARACTER_MAP)
    mixed = CODE + "NAMES = [\n" + "    'a',\n" * 40 + "]\n"
    (library / "mixed.py").write_text(mixed)
    kept = {document.id: document.text for document in standard_library_documents()}
    whole = {document.id: document.text for document in standard_library_documents(include_tables=True)}
    assert set(whole) - set(kept) == {"python-stdlib/encodings/cp0.py"}
    assert whole["python-stdlib/encodings/cp0.py"] == CHARACTER_MAP
    assert whole["python-stdlib/mixed.py"] == mixed
    assert kept["python-stdlib/mixed.py"] == CODE + "NAMES = [\n" + "    'a',\n" * corpus.NEAR_COPIES + "]\n"
    assert {name for name in kept if kept[name] != whole[name]} == {"python-stdlib/mixed.py"}


def test_tables_of_this_python_go_and_its_code_stays() -> None:
    kept = {document.id.removeprefix("python-stdlib/") for document in standard_library_documents()}
    whole = [document.id.removeprefix("python-stdlib/") for document in standard_library_documents(include_tables=True)]
    tables = {"encodings/cp1251.py", "encodings/cp437.py", "html/entities.py", "stringprep.py", "token.py", "locale.py"}
    assert tables <= set(whole)
    assert not tables & kept
    code = {"argparse.py", "json/decoder.py", "encodings/utf_16.py", "typing.py", "tkinter/__init__.py", "mimetypes.py"}
    assert code <= kept
    assert 0.8 < len(kept) / len(whole) < 1.0


def test_what_stays_of_this_python_is_still_python() -> None:
    whole = {document.id: document.text for document in standard_library_documents(include_tables=True)}
    changed = [document for document in standard_library_documents() if document.text != whole[document.id]]
    assert changed
    for document in changed:
        ast.parse(whole[document.id])
        ast.parse(document.text)


def test_split_is_the_formula_on_every_machine() -> None:
    # blake2b(b"python-stdlib/abc.py", digest_size=8), worked out once
    share = 0.22841015803557976
    assert not is_held_out("python-stdlib/abc.py", share=share)
    assert is_held_out("python-stdlib/abc.py", share=share + 1e-9)


def test_split_has_about_the_share_asked_for() -> None:
    names = [f"document-{index}" for index in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.05)}
    assert 0.04 < len(held_out) / len(names) < 0.06
    assert held_out < {name for name in names if is_held_out(name, 0.1)}


def test_split_refuses_a_share_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"share must lie between 0 and 1; got 5\. Give 0\.05 for 5 %\."):
        is_held_out("a", share=5)


def test_module_imports_nothing_of_the_package() -> None:
    tree = ast.parse(Path(corpus.__file__).read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("kronsae") for module in modules)
