"""The pages of the studies hold what their result files say, and nothing typed in."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("toy", "synthetic")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_results", ROOT / "scripts" / f"{name}_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_the_result_file(name: str) -> None:
    study = script(name)
    page = study.PAGE.read_text("utf-8")
    if study.RESULT.exists():
        kept: dict[str, Any] = json.loads(study.RESULT.read_text("utf-8"))
        assert f"{study.START}\n{study.markdown(kept)}\n{study.END}" in page
    else:  # not measured yet: then there are no figures to show
        assert f"{study.START}\n{study.END}" in page
