"""The distribution contains all files that the package needs, and the version is the same everywhere."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import kronsae

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kronsae"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PATTERNS: list[str] = PROJECT["tool"]["setuptools"]["package-data"]["kronsae"]
MAX_BUNDLED_BYTES = 12_000_000
DATA_FILES = [
    path
    for path in PACKAGE.rglob("*")
    if path.is_file()
    and path.suffix != ".py"
    and not path.name.startswith(".")
    and "__pycache__" not in path.parts  # numba keeps its cache there too
]


def _pins() -> dict[str, str]:
    """Return the version of each lower-case package name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def _requirements() -> list[str]:
    project = PROJECT["project"]
    extras = [line for name in ("fast", "tensorboard", "dev") for line in project["optional-dependencies"][name]]
    return [*project["dependencies"], *extras, *PROJECT["build-system"]["requires"]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_package_data_names_files_that_exist(pattern: str) -> None:
    assert any(path.is_file() for path in PACKAGE.glob(pattern)), f"package-data: nothing matches {pattern}."


def test_every_file_beside_the_code_is_packed() -> None:
    packed = {path for pattern in PATTERNS for path in PACKAGE.glob(pattern)}
    missing = sorted(str(path.relative_to(PACKAGE)) for path in DATA_FILES if path not in packed)
    assert missing == [], "not in pyproject's package-data: an installed copy would lack them"


def test_the_bundled_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in DATA_FILES if "bundled" in path.parts) <= MAX_BUNDLED_BYTES


def test_one_version_everywhere() -> None:
    assert kronsae.__version__ == version("kronsae") == PROJECT["project"]["version"], "reinstall: make setup"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == kronsae.__version__
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert headings[0] == kronsae.__version__


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert "Kronecker" in paper["title"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Kurochkin",
        "Aksenov",
        "Laptev",
        "Gavrilov",
        "Balagansky",
    ]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_a_reader_finds_the_papers(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_constraints_pin_every_requirement() -> None:
    pins = _pins()
    named = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in _requirements()} - {"kronsae"}
    assert named - set(pins) == set(), "run `make lock`"
    assert pins["torch"] == "2.13.0"


def test_constraints_and_project_name_no_other_source() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"index-url|find-links|pytorch\.org|git\+", text), f"{name}: packages come from PyPI alone"
