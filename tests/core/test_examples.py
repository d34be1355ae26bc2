from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import kronsae.core

MODULES = sorted(module.name for module in pkgutil.iter_modules(kronsae.core.__path__, "kronsae.core."))


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module), raise_on_error=False)
    assert results.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [example for name in MODULES for example in finder.find(importlib.import_module(name)) if example.examples]
    assert len(found) >= 3
