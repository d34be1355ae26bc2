"""Rules about imports and calls, checked by parsing the source (``ast``), including function bodies.

A room is a folder or a module directly under ``src/kronsae``. ``ARROWS`` says which rooms a room may import;
a room that is not in the table is an error, so a new one has to be given its place here.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kronsae

SRC = Path(__file__).parents[1] / "src" / "kronsae"
MAX_LINES = 500

SUPPORT = "support"
"""Room that every room may import."""

ARROWS: dict[str, set[str]] = {
    "support": set(),
    "kernels": set(),
    "core": {"kernels"},
    # `bundled` is the address of the model folder, no more; the scripts that made the model read the corpus.
    "bundled": set(),
    "bundled scripts": {"bundled", "data"},
    "data": {"bundled"},
    "training": {"core", "kernels"},
    # training over several processes; the trainer, core and kernels stay unaware of torch.distributed
    "distributed": {"core", "kernels", "training", "data"},
    "eval": {"core", "kernels", "data"},
    "interop": {"core", "kernels"},
    "chat": set(),
    "bench": {"core", "kernels", "training"},
    "report": {"eval", "core"},
    "runs": {"core", "kernels", "data", "training", "distributed", "eval", "report", "interop"},
    # what a run needs on given devices, before anything is loaded
    "capacity": {"bundled", "core", "data", "training", "runs"},
    "sweeps": {"core", "training", "report", "runs"},
    "measures": {"core", "data", "training", "eval", "report", "runs", "chat", "interop"},
    "interventions": {"core", "kernels", "data", "eval", "runs", "interop"},
    "publishing": {"core", "interop", "runs", "report", "data", "training", "eval"},
    # the paper's tables and figures, with one runner
    "reproduce": {"core", "data", "eval", "report", "runs", "sweeps", "measures", "bench"},
    # checks of an installation: runs that are killed, files that are damaged
    "doctor": {"core", "data", "training", "distributed", "runs", "sweeps"},
    "cli": {
        "data",
        "distributed",
        "eval",
        "report",
        "runs",
        "sweeps",
        "measures",
        "interventions",
        "publishing",
        "bench",
        "interop",
        "reproduce",
        "doctor",
        "capacity",
    },
    "__main__": {"cli"},
}
"""Rooms that each room may import in addition to ``support``."""

PLANNED: dict[str, set[str]] = {
    # the static site of a run: heads, latents, comparisons
    "explorer": {"core", "data", "eval", "report", "runs", "interventions"},
}
"""The place in the table of rooms that do not exist yet; `cli` may import all of them. Pursuit belongs to `core`."""

ROOT = "(root)"
"""``kronsae/__init__.py``: it imports all public names, so a room that imported it would import every room."""

FORBIDDEN_PACKAGES: dict[str, set[str]] = {
    "core": {"transformers", "datasets", "huggingface_hub", "torch.distributed"},
    "kernels": {"transformers", "datasets", "huggingface_hub", "torch.distributed"},
    "training": {"torch.distributed"},
    "runs": {"torch.distributed"},
}

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Modules whose files can execute code when they are read; weights are safetensors, everything else is JSON."""

PRINTING = ("cli/", "support/terminal.py")
"""Prefixes of paths under ``src/kronsae`` where ``print`` is allowed."""


def _files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def _module(path: Path) -> str:
    parts = ["kronsae", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in _files()}
EVERY_FILE = pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(SRC)))


def _room(module: str) -> str:
    """Return the room of a dotted module name: ``kronsae.core.sae`` -> ``core``, ``kronsae`` -> ``(root)``."""
    parts = module.split(".")
    if len(parts) == 1:
        return ROOT
    return "bundled scripts" if parts[1] == "bundled" and len(parts) > 2 else parts[1]


def _dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` for an attribute chain, and ``""`` for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imports(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """Return line and full dotted name of every import in ``source``, including those in functions.

    ``module`` is the importing module's name, ``package`` whether it is an ``__init__``: relative imports count
    from there. ``from x import y`` is ``x.y`` where that is a module of ours or y may be one of another package's.
    Also found: imports under ``TYPE_CHECKING``, in functions, ``import_module("x")``, ``__import__("x")`` and the use
    of a submodule through its parent (``torch.distributed.barrier``).
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if package else module.split(".")[:-1]
                anchor = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*anchor, node.module] if node.module else anchor)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, base if base.split(".")[0] == "kronsae" and name not in MODULES else name
        elif isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and _dotted(node).startswith("torch."):
            yield node.lineno, _dotted(node)


def wrong_arrows(source: str, module: str, *, package: bool = False) -> list[str]:
    """Return the violations of ``ARROWS`` by the imports of ``source``, as sentences."""
    room = _room(module)
    if room == ROOT:
        return []
    if room not in ARROWS:
        return [f"{module}: room '{room}' has no place in the table ARROWS of tests/test_architecture.py; add it."]
    allowed = {room, SUPPORT, *ARROWS[room]}
    found = set()
    for line, name in imports(source, module, package=package):
        if name.split(".")[0] == "kronsae" and _room(name) not in allowed:
            found.add((line, f"{room} may not import {_room(name)} ({name}), only {', '.join(sorted(allowed))}."))
        for package_name in FORBIDDEN_PACKAGES.get(room, ()):
            if f"{name}.".startswith(f"{package_name}."):
                found.add((line, f"{room} may not use {package_name}."))
    return [f"{module}:{line}: {sentence}" for line, sentence in sorted(found)]


def unsafe_calls(source: str) -> list[str]:
    """Return the lines of ``source`` that could execute code from a file: pickle, torch.load, eval, exec, ..."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _dotted(node.func) in ("eval", "exec"):
            found.add((node.lineno, f"{_dotted(node.func)}()"))
        elif isinstance(node, ast.keyword | ast.Dict):
            keys = [ast.Constant(node.arg)] if isinstance(node, ast.keyword) else node.keys
            for key, value in zip(keys, [node.value] if isinstance(node, ast.keyword) else node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                is_false = isinstance(value, ast.Constant) and value.value is False
                if name in ("trust_remote_code", "allow_pickle") and not is_false:
                    found.add((value.lineno, f"{name} may only be False"))
    for line, name in imports(source, "kronsae.x"):
        if name.split(".")[0] in PICKLES or name == "torch.load":
            found.add((line, f"{name} reads pickles; weights are safetensors, the rest is JSON"))
    return [f"line {line}: {sentence}" for line, sentence in sorted(found)]


def prints(source: str) -> list[int]:
    """Return the line numbers of calls of ``print``."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [node.lineno for node in calls if _dotted(node.func) == "print"]


@EVERY_FILE
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_arrows(path.read_text("utf-8"), _module(path), package=path.name == "__init__.py") == []


@EVERY_FILE
def test_nothing_runs_code_out_of_a_file(path: Path) -> None:
    assert unsafe_calls(path.read_text("utf-8")) == []


@EVERY_FILE
def test_only_the_command_line_prints(path: Path) -> None:
    if not path.relative_to(SRC).as_posix().startswith(PRINTING):
        assert prints(path.read_text("utf-8")) == []


@EVERY_FILE
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines, more than {MAX_LINES}: split it."


def test_the_table_names_no_vanished_room() -> None:
    gone = {room for room in ARROWS if room != "bundled scripts"} - {_room(module) for module in MODULES}
    assert gone == set()


def imported_modules(source: str, module: str, *, package: bool = False) -> set[str]:
    """Return our modules that ``source`` imports, functions included; the root's public names are not followed."""
    found = set()
    for _, name in imports(source, module, package=package):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name not in ("", "kronsae", module):
            found.add(name)
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, directly or indirectly."""
    order = TopologicalSorter(graph)
    try:
        order.prepare()
    except CycleError as error:
        return [list(error.args[1])]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        _module(path): imported_modules(path.read_text("utf-8"), _module(path), package=path.name == "__init__.py")
        for path in _files()
    }
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    inside = "def f():\n    from kronsae.core.sae import SAE"
    assert imported_modules(inside, "kronsae.core.codes") == {"kronsae.core.sae"}


def test_the_arrows_hold_no_circle() -> None:
    def reached(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"the table goes in a circle: {' -> '.join((*path, room))}"
        for below in (ARROWS | PLANNED)[room]:
            reached(below, (*path, room))

    for room in ARROWS | PLANNED:
        reached(room, ())


def test_a_planned_room_that_exists_is_moved_into_the_table() -> None:
    assert PLANNED.keys() & ({_room(module) for module in MODULES} | ARROWS.keys()) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kronsae.core.sae", "import kronsae.training"),
        ("kronsae.core.sae", "from kronsae.data import text"),
        ("kronsae.core.sae", "from kronsae import training"),
        ("kronsae.core.sae", "from .. import data"),
        ("kronsae.core.sae", "from ..eval.reconstruction import x"),
        ("kronsae.core.sae", "def f():\n    from kronsae import interop"),
        ("kronsae.core.sae", "if TYPE_CHECKING:\n    from kronsae.runs.run import Run"),
        ("kronsae.core.sae", "import importlib\nimportlib.import_module('kronsae.report')"),
        ("kronsae.core.sae", "import kronsae"),
        ("kronsae.core.sae", "from kronsae import load"),
        ("kronsae.core.sae", "import transformers.models"),
        ("kronsae.core.sae", "def f():\n    from datasets import Dataset"),
        ("kronsae.core.sae", "import torch\ntorch.distributed.barrier()"),
        ("kronsae.kernels.gpu", "from torch import distributed"),
        ("kronsae.kernels.gpu", "from torch.distributed import barrier"),
        ("kronsae.kernels.gpu", "from kronsae.core.sae import SAE"),
        ("kronsae.data.text", "from kronsae.core import sae"),
        ("kronsae.data.text", "from kronsae.bundled.train import main"),
        ("kronsae.training.trainer", "from kronsae.data.buffer import ShuffleBuffer"),
        ("kronsae.eval.latents", "from kronsae.training.member import Member"),
        ("kronsae.training.member", "from kronsae.bench import measure"),
        ("kronsae.report.html", "from kronsae.training.member import Member"),
        ("kronsae.support.errors", "from kronsae.core import sae"),
        ("kronsae.attic.box", "import math"),
        ("kronsae.runs.run", "from kronsae.measures.latents import measure"),
        ("kronsae.runs.run", "def f():\n    from kronsae.cli.main import app"),
        ("kronsae.report.html", "from kronsae.runs.run import Run"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(wrong_arrows(source, module)) == 1


def test_a_right_arrow_is_let_through() -> None:
    source = "import torch\nfrom kronsae import kernels\nfrom kronsae.support.errors import UserError"
    assert wrong_arrows(source, "kronsae.core.sae") == []
    assert wrong_arrows("from .codes import SparseCodes", "kronsae.core.sae") == []
    assert wrong_arrows("from .codes import SparseCodes", "kronsae.core", package=True) == []
    assert wrong_arrows("from kronsae.data.text import TextStream", "kronsae.runs.pipeline") == []
    assert wrong_arrows("from ..core.sae import SAE", "kronsae.eval.latents") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "from functools import partial\nf = partial(torch.load, weights_only=True)",
        "eval('1')",
        "exec('1')",
        "from_pretrained('x', trust_remote_code=True)",
        "from_pretrained('x', trust_remote_code=trust)",
        "options = {'trust_remote_code': True}",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_an_unsafe_call_is_found(source: str) -> None:
    assert len(unsafe_calls(source)) == 1


def test_a_safe_call_is_let_through() -> None:
    assert unsafe_calls("model.eval()\nload('x')\nfrom_pretrained('x', trust_remote_code=False)\njson.load(f)") == []


def test_a_print_is_found() -> None:
    assert prints("def f():\n    print(1)\nconsole.print(2)") == [2]


def test_every_public_name_has_a_docstring() -> None:
    if not hasattr(kronsae, "__all__"):
        pytest.skip("kronsae has no public names yet")
    assert sorted(kronsae.__all__) == sorted(set(kronsae.__all__))
    public = {name: getattr(kronsae, name) for name in kronsae.__all__}
    bare = [
        name
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)) and not _own_docstring(value)
    ]
    assert bare == [], "public names without a docstring"


def _own_docstring(value: object) -> str | None:
    """Return the docstring in the source, not an inherited one or the signature that ``dataclass`` generates."""
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    generated = inspect.isclass(value) and isinstance(doc, str) and doc.startswith(f"{value.__name__}(")
    return None if generated or not isinstance(doc, str) else doc.strip()


def test_the_map_for_contributors_names_every_room() -> None:
    house = (
        (SRC.parents[1] / "CONTRIBUTING.md").read_text("utf-8").partition("```\nsrc/kronsae/\n")[2].partition("```")[0]
    )
    rooms = {path.name for path in SRC.iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"\n  {room}/ " in f"\n{house}"} == rooms
