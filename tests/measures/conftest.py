"""Runs for measurements: finished ones, each with a folder of its own for results."""

from __future__ import annotations

from pathlib import Path

import pytest

from kronsae.run import Run


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """The finished run, with a folder of its own for results."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_run.folder.iterdir():
        (folder / path.name).symlink_to(path)
    return Run(folder)
