"""Checks against the real packages of others; `make test-interop` runs them, each folder in its own environment.

A check reports what it found with the fixture `record`. The entries of passed checks are written to the file that
``KRONSAE_INTEROP_RESULTS`` names; `scripts/test_interop.py` puts them into docs/results/interop.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest

ENVIRONMENT = os.environ.get("KRONSAE_INTEROP")
"""Name of the environment that this process runs in; not set under `make test`, which skips this folder."""

RESULTS = os.environ.get("KRONSAE_INTEROP_RESULTS")

Direction = Literal["read", "write", "train", "use"]

collect_ignore_glob = [] if ENVIRONMENT else ["*"]

_passed: list[dict[str, Any]] = []
_OUTCOME: pytest.StashKey[bool] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the call of a test passed."""
    report = yield
    if report.when == "call":
        item.stash[_OUTCOME] = report.passed
    return report


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Return a function that records the result of a check: ``record(check, format=..., direction=..., package=...)``.

    Args of the function:
        check: what was compared, in a few words, such as ``"latents and reconstruction"``.
        format: row of the table: the package's name and its architecture, such as ``"SAELens topk"``.
        direction: ``read`` (we open what the package wrote), ``write`` (the package opens what we wrote), ``train``
            (the package trains our architecture) or ``use`` (another function of the package works on our SAE).
        package: the distribution whose version is noted, such as ``"sae-lens"``.
        difference: largest absolute difference that was measured; None: nothing to measure.
        tolerance: the limit that the test asserts.

    Several entries may be recorded; they count only if the test passes.
    """
    entries: list[dict[str, Any]] = []

    def note(
        check: str,
        *,
        format: str,
        direction: Direction,
        package: str,
        difference: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        entries.append(
            {
                "format": format,
                "direction": direction,
                "check": check,
                "package": package,
                "version": version(package),
                "difference": None if difference is None else float(difference),
                "tolerance": tolerance,
                "test": request.node.nodeid.partition("interop_real/")[2] or request.node.nodeid,
            }
        )

    yield note
    if request.node.stash.get(_OUTCOME, False):
        _passed.extend(entries)


def pytest_sessionfinish() -> None:
    """Write the entries of this session."""
    if RESULTS is not None:
        Path(RESULTS).write_text(json.dumps(_passed, indent=2) + "\n", encoding="utf-8")
