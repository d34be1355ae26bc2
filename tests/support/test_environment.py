"""Environments of other libraries: where they are, how they are built, and that our package alone is in their path."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kronsae.support import environment
from kronsae.support.environment import READY_FILE, Environment
from kronsae.support.errors import UserError


@pytest.fixture
def small(own_cache: Path) -> Environment:
    """An environment without packages."""
    return Environment("small", "# nothing")


def test_it_is_kept_by_requirements(small: Environment, own_cache: Path) -> None:
    assert small.folder.parent == own_cache / "environments"
    assert small.folder == Environment("small", "# nothing").folder
    assert small.folder != Environment("small", "# something").folder
    assert not small.ready


def test_torch_stays_in_the_version_that_runs(small: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], name: str) -> None:
        commands.append(command)
        small.python.parent.mkdir(parents=True, exist_ok=True)
        small.python.touch()

    monkeypatch.setattr(environment, "_run", run)
    small.build()
    assert small.ready
    assert commands[0][:3] == [sys.executable, "-m", "venv"]
    assert f"torch=={environment._torch_version()}" in commands[1]
    assert "--no-deps" in commands[2]
    assert Path(commands[1][-1]).read_text() == Path(commands[2][-1]).read_text() == "# nothing"
    small.build()
    assert len(commands) == 3  # it is there


def test_a_build_that_fails_is_no_environment(small: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(UserError, match=r"the environment 'small' cannot be built: .* its words are above"):
        small.build()
    assert not small.ready


def test_a_marker_without_an_interpreter_is_not_enough(small: Environment) -> None:
    small.folder.mkdir(parents=True)
    (small.folder / READY_FILE).write_text("{}")
    assert not small.ready


def test_only_our_package_is_in_the_path_of_the_other_python(small: Environment) -> None:
    small.python.parent.mkdir(parents=True)
    small.python.symlink_to(sys.executable)
    bridge = environment._bridge(small.folder)
    assert environment._bridge(small.folder) == bridge  # again
    names = sorted(path.name for path in bridge.iterdir())
    assert len(names) == 2
    assert names[0] == "kronsae"
    assert names[1].endswith(".dist-info")
    code = "import json, sys, importlib.metadata as m; print(json.dumps([m.version('kronsae'), sys.path[0]]))"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", code], env={"PYTHONPATH": str(bridge)}, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [importlib.metadata.version("kronsae"), str(bridge)]


def test_the_exit_status_is_that_of_the_module(small: Environment) -> None:
    small.python.parent.mkdir(parents=True)
    small.python.write_text('#!/bin/sh\ntest "$2" = some.module && test "$HF_HUB_OFFLINE" = 1 && exit 7\n')
    small.python.chmod(0o755)
    assert small.run_module("some.module", offline=True) == 7
