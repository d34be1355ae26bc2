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
