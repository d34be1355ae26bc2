"""The Python blocks of README and docs/ run, and README lists all commands and measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kronsae.cli.main import app
from kronsae.report.measurements import MEASUREMENTS
from kronsae.sweeps.grid import points, sweep_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SWEEPS = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")


def python_of(page: Path) -> str:
    """Return the page's Python blocks, in order, as one script: a block may use names from earlier blocks."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if python_of(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-c", python_of(page)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_pages_have_blocks() -> None:
    assert {"README.md", "intervention.md", "sweeps.md"} <= {page.name for page in PAGES}


def test_all_commands_are_listed() -> None:
    section = README.split("\n## Commands\n")[1].split("\n## ")[0]
    group = typer.main.get_group(app)
    assert sorted(re.findall(r"^\| `kronsae ([\w-]+)` \|", section, flags=re.MULTILINE)) == sorted(group.commands)


def test_all_measurements_are_listed() -> None:
    named = re.findall(r"^\| \[`([\w-]+)`\]\(docs/measurements/", README, flags=re.MULTILINE)
    assert sorted(named) == sorted(MEASUREMENTS)


def test_the_grid_file_can_be_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", SWEEPS, flags=re.DOTALL)
    (tmp_path / "grid.json").write_text(block, encoding="utf-8")
    assert len(points(sweep_config(tmp_path / "grid.json", {}))) == 3 * 2 * 3


def test_table_is_the_result_files() -> None:
    path = ROOT / "scripts" / "quickstart_results.py"
    spec = importlib.util.spec_from_file_location("quickstart_results", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look up their module here
    spec.loader.exec_module(script)
    for model, place in script.PLACES.items():
        result = json.loads(place.result.read_text(encoding="utf-8"))
        assert f"{place.start}\n{script.table(result, model)}\n{script.END}" in place.page.read_text(encoding="utf-8")
