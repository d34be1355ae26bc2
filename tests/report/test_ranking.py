"""The sentence on who leads, by hand-made figures: clear, a tie, within chance, too few."""

from __future__ import annotations

import pytest

from kronsae.report.ranking import who_leads

SEED = " Each SAE is one training, with one seed: another may order them otherwise."
LOW, HIGH = (0.10, 0.21, 0.29, 0.40), (0.20, 0.30, 0.40, 0.50)  # apart by 0.1 in each part
WIDE = (0.50, 0.10, 0.50, 0.06)  # a larger mean than LOW's, but not in every part


@pytest.mark.parametrize(
    ("values", "less", "expected"),
    [
        ({"a": LOW}, True, ""),
        (
            {"a": LOW, "b": HIGH},
            True,
            "a has the least mean x, 0.250, and a paired t-test over the 4 parts at 0.05 tells it from every other."
            + SEED,
        ),
        (
            {"a": LOW, "b": HIGH},
            False,
            "b has the largest mean x, 0.350, and a paired t-test over the 4 parts at 0.05 tells it from every other."
            + SEED,
        ),
        ({"a": LOW, "b": LOW, "c": LOW[::-1]}, True, "All have the same mean x, 0.250."),
        (
            {"b": HIGH, "a": LOW, "c": LOW},
            True,
            "a and c share the least mean x, 0.250, and a paired t-test over the 4 parts at 0.05, corrected for 2 "
            "comparisons, tells them from every other." + SEED,
        ),
        (
            {"a": LOW, "b": HIGH, "w": WIDE},
            True,
            "a has the least mean x, 0.250, but not by more than chance: a paired t-test over the 4 parts at 0.05, "
            "corrected for 2 comparisons, does not tell w from a." + SEED,
        ),
        (
            {"a": (0.2,), "b": (0.3,)},
            True,
            "a has the least mean x, 0.200; with one of the parts alone, nothing says whether by more than chance.",
        ),
    ],
)
def test_no_louder_than_the_figures(values: dict[str, tuple[float, ...]], less: bool, expected: str) -> None:
    assert who_leads(values, figure="x", over="parts", less_is_better=less) == expected


def test_names_are_made_visible() -> None:
    assert "\u202e" not in who_leads({"a\u202e": LOW, "b": HIGH}, figure="x", over="parts", less_is_better=True)
