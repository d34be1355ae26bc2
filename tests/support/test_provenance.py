"""The commit that a result names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kronsae.support import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the package's folder in a checkout of its own, of which `provenance` is told to be a part."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    package = tmp_path / "src" / "kronsae"
    for place in ("support", "core"):
        (package / place).mkdir(parents=True)
        (package / place / "module.py").write_text("x = 1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "support" / "provenance.py"))
    return package


def test_a_change_anywhere_in_the_package_is_named(checkout: Path) -> None:
    clean = provenance.commit()
    assert clean is not None
    assert len(clean) == 12
    (checkout / "core" / "module.py").write_text("x = 2\n")
    assert provenance.commit() == f"{clean}-dirty"


def test_a_change_outside_of_the_package_does_not_matter(checkout: Path) -> None:
    (checkout.parents[1] / "README.md").write_text("text\n")
    assert str(provenance.commit()).endswith("-dirty") is False


def test_no_commit_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "kronsae" / "support" / "provenance.py"))
    assert provenance.commit() is None
