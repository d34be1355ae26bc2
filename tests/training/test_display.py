"""Test the progress display: lines without a terminal, a live table in a terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console

from kronsae.training import display
from kronsae.training.display import DisplaySink

ROW: dict[str, Any] = {
    "step": 3,
    "tokens": 300,
    "seconds": 1.0,
    "sae": "kron",
    "loss": 0.25,
    "explained_variance": 0.9876,
    "l0": 31.5,
    "dead_share": 0.125,
    "lr": 1e-4,
}


def plain(text: str) -> str:
    """Return the text without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_lines_on_stderr_and_not_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    sink = DisplaySink(1000, 100)
    for _ in range(3):
        sink.write(ROW)
    sink.flush()
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("300 of 1,000 tokens, ")
    assert line.endswith(" s left | kron EV 0.9876 l0 31.5 dead 12.5%")
    assert " tokens/s, " in line


def test_a_line_has_every_sae_of_its_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(display, "monotonic", lambda: now[0])
    sink = DisplaySink(1000, 0)
    for tokens, seconds in ((300, 1.0), (400, 2.0), (500, 20.0), (600, 21.0)):
        now[0] = seconds
        for name in ("kron", "topk"):
            sink.write(ROW | {"sae": name, "tokens": tokens})
    sink.close()
    sink.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["300", "400", "600"]
    assert all("kron EV" in line and "topk EV" in line for line in lines)


def test_what_is_not_known_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    sink = DisplaySink(1000, 0)
    sink.write(ROW | {"explained_variance": None})
    sink.close()
    assert "kron EV - l0 31.5" in capsys.readouterr().err


def test_a_live_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def terminal(**options: Any) -> Console:
        return Console(force_terminal=True, width=120, **options)

    monkeypatch.setattr(display, "Console", terminal)
    sink = DisplaySink(1000, 0)
    sink.write(ROW)
    sink.write(ROW | {"sae": "topk", "explained_variance": None})
    sink.write(ROW | {"tokens": 600})
    sink.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in ("training", "60%", "tokens/s", "SAE", "kron", "topk", "0.9876", "31.5", "12.5%", "0.25", "1.0e-04"):
        assert text in shown.err
    assert re.search(r"60% [\d,]+ tokens/s \d:\d\d:\d\d", plain(shown.err))
