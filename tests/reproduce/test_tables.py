"""Means, differences by seed and verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from kronsae.reproduce.claims import Holds
from kronsae.reproduce.tables import EXPLAINED, Column, Comparison, judge, mean_and_range, means, minus, of


def row(name: str, seed: int, ev: float | None) -> dict[str, Any]:
    return {"name": name, "seed": seed, "explained_variance": ev, EXPLAINED: ev}


ROWS = [row("a", 0, 0.5), row("b", 0, 0.4), row("b", 1, 0.6), row("a", 1, 0.9)]


def test_differences_are_taken_between_rows_of_the_same_seed() -> None:
    assert minus(of(ROWS, name="a"), of(ROWS, name="b")) == pytest.approx([0.1, 0.3])
    assert minus(of(ROWS, name="a"), [row("b", 1, 0.6)]) == pytest.approx([0.3])


def test_a_line_has_the_mean_the_range_and_the_number_of_seeds() -> None:
    assert means(ROWS, [Column("SAE", "name", "{}")], [Column("EV", "explained_variance", "{:.2f}")]) == [
        "| SAE | EV | seeds |",
        "| --- | --- | --- |",
        "| a | 0.70 (0.50 to 0.90) | 2 |",
        "| b | 0.50 (0.40 to 0.60) | 2 |",
    ]


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    assert Column("EV", "explained_variance").cell([row("a", 0, 0.5), row("a", 1, None)]) == "–"


def test_equal_values_have_no_range() -> None:
    assert mean_and_range([0.12341, 0.12342]) == "0.1234"


@pytest.mark.parametrize(
    ("differences", "above", "holds"),
    [
        ([[0.1, 0.2], [0.3, 0.1]], 0.0, Holds.YES),
        ([[0.1, 0.2], [0.3, -0.1]], 0.0, Holds.PARTLY),
        ([[0.1, -0.2], [-0.3, -0.1]], 0.0, Holds.NO),
        ([[-0.1, -0.05]], -0.2, Holds.YES),
        ([[-0.1, -0.3]], -0.2, Holds.NO),
        ([[0.1]], 0.0, Holds.UNDECIDED),
    ],
)
def test_a_claim_holds_if_every_seed_agrees(differences: list[list[float]], above: float, holds: Holds) -> None:
    verdict = judge([Comparison("a minus b", values, above=above) for values in differences])
    assert verdict.holds == holds
    assert "a minus b: " in verdict.why
    disagreeing = sum(max(values) < above for values in differences)
    assert f", {disagreeing} disagree in every seed. a minus b" in verdict.why


def test_a_sentence_says_where_seeds_disagree() -> None:
    assert str(Comparison("a minus b", [0.1, -0.1])) == "a minus b: +0.0000 (-0.1000 to +0.1000), not of one sign"
    assert str(Comparison("a minus b", [0.1, 0.1])) == "a minus b: +0.1000"
