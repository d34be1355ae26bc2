"""What is shown of work whose length is known: a line now and then where stderr is no terminal, else a bar."""

from __future__ import annotations

from typing import Any

import pytest
import rich.console

from kronsae.support import progress as module
from kronsae.support.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its one entry."""
    now = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("evaluating") as report:
        for seconds, done in ((4, 5), (11, 10), (21, 300), (25, 400), (34, 600), (50, 1000)):
            clock[0] = seconds
            report(done, 1000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "evaluating: 1%\nevaluating: 30%, about 49 s left\nevaluating: 60%, about 23 s left\n"


def test_a_new_stage_has_a_rate_of_its_own(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("absorption") as report:
        for seconds, done, total in ((1, 50, 100), (2, 100, 100), (20, 10, 50), (40, 20, 50)):
            clock[0] = seconds
            report(done, total)
    assert capsys.readouterr().err == "absorption: 20%\nabsorption: 40%, about 60 s left\n"


def test_nothing_of_what_is_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("evaluating", quiet=True) as report:
        clock[0] = 100
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = rich.console.Console

    def terminal(**options: Any) -> rich.console.Console:
        return plain(force_terminal=True, width=100, **options)

    monkeypatch.setattr(rich.console, "Console", terminal)
    with progress_bar("evaluating") as report:
        report(1, 2)
    assert "evaluating" in capsys.readouterr().err
