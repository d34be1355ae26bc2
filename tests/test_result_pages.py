"""The pages of the studies agree with their result files and contain no other numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kronsae.reproduce.runner import index, known_results
from kronsae.sweeps.results import as_csv

ROOT = Path(__file__).resolve().parent.parent
STUDIES = (
    "corpus_study",
    "synthetic_results",
    "steering_study",
    "mixing_results",
    "pursuit_ideas",
    "refit_study",
    "interop_results",
    "saebench_results",
    "planning_results",
    "crash_results",
    "autointerp_results",
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_the_result_file(name: str) -> None:
    study = script(name)
    page = study.PAGE.read_text("utf-8")
    if study.RESULT.exists():
        kept: dict[str, Any] = json.loads(study.RESULT.read_text("utf-8"))
        assert f"{study.START}\n{study.markdown(kept)}\n{study.END}" in page
    else:  # not measured yet, so there are no results to show
        assert f"{study.START}\n{study.END}" in page


def test_the_predictions_are_those_of_the_present_formulas() -> None:
    """A change of a formula or of a measured file needs `python scripts/planning_results.py`."""
    study = script("planning_results")
    kept: dict[str, Any] = json.loads(study.RESULT.read_text("utf-8"))
    assert {"commit": kept["commit"], **study.compare()} == kept


def test_the_table_of_devices_is_the_code_s() -> None:
    study = script("planning_results")
    first, last = study.DEVICE_MARKS
    assert f"{first}\n{study.devices()}\n{last}" in study.PAGE.read_text("utf-8")


def test_predictions_agree_with_measurements() -> None:
    """Memory and the steps of large dictionaries; docs/planning.md says why small steps take longer than predicted."""
    kept = json.loads(script("planning_results").RESULT.read_text("utf-8"))
    for point in kept["points"]:
        assert 0.45 < point["ratio"] < 1.5, point
        if point["unit"] == "MiB" or point["file"] in ("step.csv", "scaling.csv", "grid.csv"):
            assert 0.7 < point["ratio"] < 1.4, point
        if point["unit"] == "MiB" and point["measured"] > 300:
            assert 0.95 < point["ratio"] < 1.1, point


def test_the_pages_of_the_dictionaries_are_their_result_file() -> None:
    study = script("dictionary_study")
    kept: dict[str, Any] = json.loads(study.RESULT.read_text("utf-8"))
    for name, markdown in study.PAGES.items():
        assert f"{study.START}\n{markdown(kept)}\n{study.END}" in study.page_path(name).read_text("utf-8")


def test_the_page_of_pursuit_is_its_result_file() -> None:
    study = script("pursuit_study")
    page = study.PAGE.read_text("utf-8")
    measured = study.RESULT.exists()
    kept = json.loads(study.RESULT.read_text("utf-8")) if measured else {}
    for mark, markdown in study.TABLES.items():
        text = f"{markdown(kept)}\n" if measured else ""
        assert f"<!-- results:{mark} -->\n{text}{study.END}" in page


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "reproductions").glob("*/")), ids=lambda path: path.name)
def test_the_pages_of_the_reproductions_are_their_result_files(folder: Path) -> None:
    found = known_results(folder)
    assert (folder / "README.md").read_text("utf-8") == index(found)
    assert {path.stem for path in folder.glob("*.md")} == {"README", *(one.study.name for one in found)}
    for one in found:
        assert (folder / f"{one.study.name}.md").read_text("utf-8") == one.page
        assert (folder / f"{one.study.name}.csv").read_text("utf-8") == as_csv(one.kept["rows"])


def test_the_report_quotes_the_results_of_the_reproductions() -> None:
    report = script("report_results")
    page = report.PAGE.read_text("utf-8")
    for mark, text in report.blocks().items():
        assert f"<!-- results:{mark} -->\n{text}\n{report.END}" in page


def test_no_page_has_a_time_that_was_typed_in() -> None:
    """Durations appear only between the marks of generated parts, where a test compares them with a file."""
    typed = {}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"<!-- results:.*?<!-- /results[^>]*-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        if found := re.findall(r"\b\d[\d.]* (?:s|seconds|minutes|hours)\b", text):
            typed[page.name] = found
    assert typed == {}


def test_the_pages_words_come_from_the_figures() -> None:
    rows = [
        {"sae": sae, "encoder": encoder, "family": "topk", "seed": seed, "mcc": mcc + seed / 100}
        for seed in (0, 1)
        for sae, encoder, mcc in (("topk", "dense", 0.5), ("kron", "kronecker", 0.25))
    ]
    about = [{"seed": seed, "features": 9, "d_in": 3, "l0": 2.0 + seed} for seed in (0, 1)]
    kept = {
        "result": {"about": about, "rows": rows},
        "settings": {"steps": 10, "batch": 200},
        "provenance": {"processor": "a processor", "cores": 2, "commit": "abc"},
        "seconds": 90.0,
    }
    page = script("synthetic_results").markdown(kept)
    assert "| kron | 0.255 ± 0.007 |" in page
    assert "- Over 2 pairs, Kronecker encoders are significantly worse in MCC (−0.250 ± 0.000)." in page
    assert "9 features in width 3, 2.5 of them active per token; 2,000 training tokens" in page
    assert "Measured in 90 s on 2 core(s) of a processor, commit abc" in page


def test_every_form_of_the_study_is_one_of_its_own() -> None:
    names = [member.name for member in script("synthetic_results").members()]
    assert len(names) == len(set(names)) == 11


def test_the_research_log_is_its_result_file() -> None:
    module = script("research_results")
    rows = json.loads(module.RESULT.read_text(encoding="utf-8"))["rows"]
    log = module.LOG.read_text(encoding="utf-8")
    for mark, make in (("rates", module._rates), ("sizes", module._sizes), ("ideas", module._ideas)):
        assert f"<!-- results:{mark} -->\n" + "\n".join(make(rows)) + f"\n<!-- /results:{mark} -->" in log


def test_what_a_compiled_pass_is_worth() -> None:
    tables = script("speed_tables")
    usual, compiled = {"ratio": "1.0"}, {"ratio": "1.25", "first_seconds": "60"}
    assert tables.worth(usual, compiled) == "as much as 5 minutes of passes save"
    for ratio in ("1.0", "0.9"):
        assert tables.worth(usual, compiled | {"ratio": ratio}) == "which no pass saves"
