"""Fixtures: finished runs to measure, each in its own folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kronsae.runs.run import Run


@pytest.fixture(scope="module")
def finished_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a copy of the finished run for each module, so that modules do not see each other's results."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path_factory.mktemp("measured") / "run")))


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """Return the finished run in the module's own folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_run.folder.iterdir():
        (folder / path.name).symlink_to(path)
    return Run(folder)
