"""README's Python blocks run as they stand, and its table is what its result file says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "kron" in done.stdout


def test_there_are_blocks() -> None:
    assert BLOCKS


def test_table_is_the_result_files() -> None:
    path = ROOT / "scripts" / "quickstart_results.py"
    spec = importlib.util.spec_from_file_location("quickstart_results", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert f"{script.START}\n{script.table(result)}\n{script.END}" in README
