"""The paper's tables and figures as studies: one function each, one runner, a page with a verdict.

A study is a module of this package with a `Study` named ``STUDY``. It says what the paper claims, trains the SAEs it
needs through `Context` (a sweep that all studies of a scale share, so that no SAE is trained twice), measures them, and
judges the claim. `run_study` adds provenance, results and the page. ``kronsae reproduce --list`` shows all of them.
"""

from __future__ import annotations

from importlib import import_module

from kronsae.reproduce.study import Study
from kronsae.support.errors import UserError, nearest

STUDIES: tuple[str, ...] = (
    "gates",
    "budgets",
    "sparsity",
    "absorption",
    "word_classes",
    "toy",
    "correlation",
    "inheritance",
    "latents",
    "token_rule",
    "speed",
    "shapes",
    "jumprelu",
    "layers",
    "geometry",
    "fidelity",
    "probing",
    "architectures",
    "pursuit",
    "meaning",
    "known_features",
    "null_symbols",
    "occupancy",
    "trunk",
)
"""Modules of the studies, in the order of the paper; those after ``fidelity`` go beyond it."""


def names() -> tuple[str, ...]:
    """Return the names of all studies, as on the command line."""
    return tuple(module.replace("_", "-") for module in STUDIES)


def study(name: str) -> Study:
    """Return the study with a name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"NAME must be one of {', '.join(names())}, or all; got '{name}'.{nearest(name, names())}")
    found = import_module(f"kronsae.reproduce.{name.replace('-', '_')}").STUDY
    assert isinstance(found, Study)
    return found
