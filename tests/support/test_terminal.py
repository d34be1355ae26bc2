"""Test that tables in a terminal never truncate numbers, for any width."""

from __future__ import annotations

import re
import sys

import pytest
from rich.table import Table

from kronsae.support.terminal import print_table

FIGURES = {f"figure {number}": f"0.{number}{number}234" for number in range(12)}


def figures(names: tuple[str, ...] = ("topk", "kron")) -> Table:
    table = Table("SAE", *FIGURES, box=None, caption="measured by hand")
    for name in names:
        table.add_row(name, *FIGURES.values())
    return table


def shown(table: Table, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a terminal of so many columns shows."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        print_table(table)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def test_a_wide_terminal_has_a_row_per_sae(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(figures(), 160, capsys, monkeypatch)
    assert [line.split()[0] for line in lines[:3]] == ["SAE", "topk", "kron"]


def test_a_narrow_one_has_a_row_per_figure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(figures(), 80, capsys, monkeypatch)
    assert lines[0].split() == ["SAE", "topk", "kron"]
    assert lines[3].split() == ["figure", "2", "0.22234", "0.22234"]
    assert "measured by hand" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_what_fits_neither_way_is_not_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown(figures(tuple(f"sae-{number}" for number in range(12))), 80, capsys, monkeypatch)
    assert len(lines) == 14
    assert all(figure in lines[5] for figure in FIGURES.values())


def test_where_nobody_looks_it_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(figures())
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["SAE", "figure"]
