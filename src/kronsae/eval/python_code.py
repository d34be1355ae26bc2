"""Labels for spans of Python source code, derived from the standard modules ``ast`` and ``tokenize``.

`python_spans` gives overlapping spans of the `CONCEPTS`; `name_roles` gives each name one of the `ROLES`. Code inside
an f-string has no span of its own, only the ``f-string`` around it. The reason: Python 3.11 reads an f-string as one
token and gives its parts the position of the whole, later versions tokenise its inside, and labels must not depend on
the Python version.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kronsae.eval.labelling import Span

CONCEPTS: tuple[str, ...] = (
    "comment",
    "docstring",
    "string",
    "f-string",
    "number",
    "operator",
    "keyword",
    "constant",
    "import",
    "decorator",
    "function name",
    "class name",
    "parameter",
    "argument default",
    "keyword argument",
    "annotation",
    "attribute",
    "called function",
    "called method",
    "assigned name",
    "self",
    "subscript",
    "comprehension",
    "return",
    "raise",
    "except clause",
    "base class",
    "class body",
)
"""Concepts of `python_spans`; a token may have several or none."""

ROLES: tuple[str, ...] = (
    "keyword",
    "imported module",
    "imported name",
    "function name",
    "class name",
    "base class",
    "decorator name",
    "parameter",
    "keyword argument",
    "caught exception",
    "raised exception",
    "attribute",
    "loop variable",
    "comment word",
    "docstring word",
    "string word",
)
"""Roles of a name, or of a word in a string or comment; one per name, the first that applies. A role must be known once
the name has been read. Whether a name is called or indexed is only known from the next token, so it is no role."""

WORD = re.compile(r"[A-Za-z_]\w*")
_FUNCTION = re.compile(r"(?:async\s+)?def\s+(\w+)")
_CLASS = re.compile(r"class\s+(\w+)")
_FROM = re.compile(r"from\s+\.*\s*([\w.]+)")
_CONSTANTS = ("None", "True", "False")
_Functions = ast.FunctionDef | ast.AsyncFunctionDef


def python_spans(source: str) -> list[Span]:
    """Return the spans of all `CONCEPTS` in a source; empty if it cannot be parsed as Python."""
    return [span for span in _all_spans(source) if span.label in CONCEPTS]


def name_roles(source: str) -> list[Span]:
    """Return one span with its role for each name, and each word in comments and strings.

    A name has the role of a span that covers exactly this name (``keyword argument``); names without a role are
    omitted. A word has the role of the comment or string around it.
    """
    spans = _all_spans(source)
    rank = {role: number for number, role in enumerate(ROLES)}
    found: dict[tuple[int, int], str] = {}
    for span in spans:
        place = (span.start, span.end)
        if span.label in rank and (place not in found or rank[span.label] < rank[found[place]]):
            found[place] = span.label
    for text_kind in ("comment", "docstring", "string"):
        for span in (span for span in spans if span.label == text_kind):
            for word in WORD.finditer(source, span.start, span.end):
                found.setdefault((word.start(), word.end()), f"{text_kind} word")
    return [Span(start=start, end=end, label=role) for (start, end), role in sorted(found.items())]


@dataclass(frozen=True)
class _Source:
    """A source with its line starts; ``ast`` counts columns in UTF-8 bytes, ``tokenize`` in characters."""

    text: str
    lines: tuple[str, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(text: str) -> _Source:
        lines = tuple(io.StringIO(text, newline="").readlines())
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        return _Source(text, lines, tuple(starts))

    def at(self, line: int, byte: int) -> int:
        """Return the character index of a byte column in a 1-based line."""
        row = self.lines[line - 1]
        return self.starts[line - 1] + (byte if row.isascii() else len(row.encode()[:byte].decode(errors="ignore")))

    def span(self, node: ast.AST, label: str) -> Span:
        """Return the span of a whole node."""
        place = [getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")]
        return Span(start=self.at(place[0], place[1]), end=self.at(place[2], place[3]), label=label)

    def word(self, pattern: re.Pattern[str], node: ast.AST, label: str) -> Iterator[Span]:
        """Yield the span of the first group of a pattern that matches at the start of a node."""
        match = pattern.match(self.text, self.span(node, "").start)
        if match is not None:
            yield Span(start=match.start(1), end=match.end(1), label=label)


def _all_spans(text: str) -> list[Span]:
    if "\r" in text or "\f" in text:  # ast and tokenize split these lines differently
        return []
    try:
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return []
    source = _Source.of(text)
    docstrings = {id(constant) for constant in _docstrings(tree)}
    spans = list(_lexical(source, tokens))
    for node in _outside_f_strings(tree):
        spans.extend(_of_node(source, node, docstrings))
    return [span for span in spans if span.start < span.end]


def _outside_f_strings(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes in the breadth-first order of `ast.walk`, except those inside an f-string."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        if not isinstance(node, ast.JoinedStr):
            waiting.extend(ast.iter_child_nodes(node))
        yield node


_F_STRING = {getattr(tokenize, "FSTRING_START", -1): 1, getattr(tokenize, "FSTRING_END", -1): -1}  # Python >= 3.12


def _lexical(source: _Source, tokens: list[tokenize.TokenInfo]) -> Iterator[Span]:
    depth = 0
    for token in tokens:
        depth += _F_STRING.get(token.type, 0)
        if depth:
            continue
        label = ""
        if token.type == tokenize.COMMENT:
            label = "comment"
        elif token.type == tokenize.NUMBER:
            label = "number"
        elif token.type == tokenize.OP:
            label = "operator"
        elif token.type == tokenize.NAME and token.string in _CONSTANTS:
            label = "constant"
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
            label = "keyword"
        elif token.type == tokenize.NAME and token.string in ("self", "cls"):
            label = "self"
        if label:
            start = source.starts[token.start[0] - 1] + token.start[1]
            end = source.starts[token.end[0] - 1] + token.end[1]
            yield Span(start=start, end=end, label=label)


def _docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | _Functions) and node.body:
            value = getattr(node.body[0], "value", None) if isinstance(node.body[0], ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _of_node(source: _Source, node: ast.AST, docstrings: set[int]) -> Iterator[Span]:
    if isinstance(node, ast.JoinedStr):
        yield source.span(node, "f-string")
    elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        yield source.span(node, "docstring" if id(node) in docstrings else "string")
    elif isinstance(node, ast.stmt):
        yield from _of_statement(source, node)
    elif isinstance(node, ast.arguments):
        for default in (*node.defaults, *node.kw_defaults):
            if default is not None:
                yield source.span(default, "argument default")
    elif isinstance(node, ast.arg):
        start = source.span(node, "").start
        yield Span(start=start, end=start + len(node.arg), label="parameter")
        if node.annotation is not None:
            yield source.span(node.annotation, "annotation")
    elif isinstance(node, ast.ExceptHandler):
        yield from _of_handler(source, node)
    elif isinstance(node, ast.expr):
        yield from _of_expression(source, node)


def _of_statement(source: _Source, node: ast.stmt) -> Iterator[Span]:
    if isinstance(node, _Functions | ast.ClassDef):
        for decorator in node.decorator_list:
            span = source.span(decorator, "decorator")
            yield span
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            yield source.span(name, "decorator name")
    if isinstance(node, _Functions):
        yield from source.word(_FUNCTION, node, "function name")
        if node.returns is not None:
            yield source.span(node.returns, "annotation")
    elif isinstance(node, ast.ClassDef):
        yield from source.word(_CLASS, node, "class name")
        yield from (source.span(base, "base class") for base in node.bases)
        body = source.span(node.body[0], ""), source.span(node.body[-1], "")
        yield Span(start=body[0].start, end=body[1].end, label="class body")
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield source.span(node, "import")
        kind = "imported module" if isinstance(node, ast.Import) else "imported name"
        for alias in node.names:
            start = source.span(alias, "").start
            yield Span(start=start, end=start + len(alias.name), label=kind)
        if isinstance(node, ast.ImportFrom):
            yield from source.word(_FROM, node, "imported module")
    elif isinstance(node, ast.Return):
        yield source.span(node, "return")
    elif isinstance(node, ast.Raise):
        yield source.span(node, "raise")
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        if isinstance(raised, ast.Name):
            yield source.span(raised, "raised exception")
    elif isinstance(node, ast.AnnAssign):
        yield source.span(node.annotation, "annotation")
    elif isinstance(node, ast.For | ast.AsyncFor):
        yield from _names_in(source, node.target, "loop variable")


def _of_handler(source: _Source, node: ast.ExceptHandler) -> Iterator[Span]:
    if node.type is not None:
        start = source.span(node, "").start
        yield Span(start=start, end=source.span(node.type, "").end, label="except clause")
        yield from _names_in(source, node.type, "caught exception")


def _of_expression(source: _Source, node: ast.expr) -> Iterator[Span]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            yield source.span(node.func, "called function")
        elif isinstance(node.func, ast.Attribute):
            yield _attribute_name(source, node.func, "called method")
        for argument in node.keywords:
            if argument.arg is not None:
                start = source.span(argument, "").start
                yield Span(start=start, end=start + len(argument.arg), label="keyword argument")
    elif isinstance(node, ast.Attribute):
        yield _attribute_name(source, node, "attribute")
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield source.span(node, "assigned name")
    elif isinstance(node, ast.Subscript):
        yield source.span(node.slice, "subscript")
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield source.span(node, "comprehension")
        for generator in node.generators:
            yield from _names_in(source, generator.target, "loop variable")


def _attribute_name(source: _Source, node: ast.Attribute, label: str) -> Span:
    end = source.span(node, "").end
    return Span(start=end - len(node.attr), end=end, label=label)


def _names_in(source: _Source, node: ast.AST, label: str) -> Iterator[Span]:
    for name in ast.walk(node):
        if isinstance(name, ast.Name):
            yield source.span(name, label)
