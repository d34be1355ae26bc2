"""Runs for measurements: finished ones, each with a folder of its own for results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kronsae.runs.run import Run


@pytest.fixture(scope="module")
def finished_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy for each module: what one measures there, no other finds."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path_factory.mktemp("measured") / "run")))


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """The finished run, with a folder of its own for results."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_run.folder.iterdir():
        (folder / path.name).symlink_to(path)
    return Run(folder)
