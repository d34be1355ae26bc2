"""What Python's own ast and tokenize say of a source, read off by eye."""

from __future__ import annotations

import ast

import pytest

from kronsae.eval.labelling import Span
from kronsae.eval.python_code import CONCEPTS, ROLES, name_roles, python_spans

SOURCE = '''"""About ä."""
import os.path
from re import compile as build  # note

@cached
class Box(Base):
    """A box."""

    def open(self, lid: int = 3, *, how="slow") -> None:
        for key in self.keys[0]:
            push(key, side=f"x{key}")
        try:
            return [y for y in lid]
        except OSError as error:
            raise ValueError("ö") from error
'''


def texts(spans: list[Span], label: str) -> list[str]:
    return [SOURCE[span.start : span.end] for span in spans if span.label == label]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("docstring", ['"""About ä."""', '"""A box."""']),
        ("comment", ["# note"]),
        ("import", ["import os.path", "from re import compile as build"]),
        ("decorator", ["cached"]),
        ("class name", ["Box"]),
        ("base class", ["Base"]),
        ("function name", ["open"]),
        ("parameter", ["self", "lid", "how"]),
        ("annotation", ["None", "int"]),
        ("argument default", ["3", '"slow"']),
        ("keyword argument", ["side"]),
        ("called function", ["push", "ValueError"]),
        ("subscript", ["0"]),
        ("f-string", ['f"x{key}"']),
        ("comprehension", ["[y for y in lid]"]),
        ("return", ["return [y for y in lid]"]),
        ("except clause", ["except OSError"]),
        ("raise", ['raise ValueError("ö") from error']),
        ("number", ["3", "0"]),
        ("self", ["self", "self"]),
        ("constant", ["None"]),
    ],
)
def test_the_concepts_of_a_source(label: str, expected: list[str]) -> None:
    assert label in CONCEPTS
    assert sorted(texts(python_spans(SOURCE), label)) == sorted(expected)


def test_the_class_body_reaches_from_its_docstring_to_its_end() -> None:
    [body] = texts(python_spans(SOURCE), "class body")
    assert body.startswith('"""A box."""')
    assert body.endswith("from error")


def test_every_name_has_one_role() -> None:
    spans = name_roles(SOURCE)
    assert len({(span.start, span.end) for span in spans}) == len(spans)
    assert {span.label for span in spans} <= set(ROLES)
    roles = {SOURCE[span.start : span.end]: span.label for span in spans}
    expected = {
        "path": "imported module",
        "re": "imported module",
        "compile": "imported name",
        "cached": "decorator name",
        "Box": "class name",
        "Base": "base class",
        "open": "function name",
        "how": "parameter",
        "keys": "attribute",
        "side": "keyword argument",
        "OSError": "caught exception",
        "ValueError": "raised exception",
        "note": "comment word",
        "box": "docstring word",
        "slow": "string word",
        "return": "keyword",
        "y": "loop variable",
    }
    assert {word: roles.get(word) for word in expected if word != "path"} == {
        word: role for word, role in expected.items() if word != "path"
    }


def test_the_inside_of_an_f_string_has_no_spans() -> None:
    """Python 3.11 places its parts where the whole is, 3.12 where they are: spans must not tell who read them."""
    inside = """f'{a.b(k=1)!r} is {d["key"]:>{w + 2}} # {self}'"""
    source = f"x = {inside}\ny = 'plain' {inside}\n"
    found = [(span.start, span.end, span.label) for span in python_spans(source)]
    first, second = source.index("f'"), source.index("'plain'")
    assert sorted(found) == sorted(
        [
            (0, 1, "assigned name"),
            (2, 3, "operator"),
            (first, first + len(inside), "f-string"),
            (first + len(inside) + 1, first + len(inside) + 2, "assigned name"),
            (second - 2, second - 1, "operator"),
            (second, len(source) - 1, "f-string"),
        ]
    )
    assert name_roles(source) == []


@pytest.mark.parametrize("source", ["def f(:\n", "x = (1", "a = 1\r\nb = 2\r\n", "\x00"])
def test_what_cannot_be_read_has_no_spans(source: str) -> None:
    assert python_spans(source) == []
    assert name_roles(source) == []


def test_our_own_sources_are_read() -> None:
    from kronsae.eval import python_code

    with open(python_code.__file__, encoding="utf-8") as file:
        source = file.read()
    functions = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = [source[span.start : span.end] for span in python_spans(source) if span.label == "function name"]
    assert sorted(found) == sorted(functions)
