"""The ranking sentence, on hand-made values: significant, a tie, not significant, too few."""

from __future__ import annotations

import pytest

from kronsae.report.ranking import ranking_sentence

SEED = " Each SAE was trained with one seed; other seeds may rank them differently."
LOW, HIGH = (0.10, 0.21, 0.29, 0.40), (0.20, 0.30, 0.40, 0.50)  # apart by 0.1 in each part
WIDE = (0.50, 0.10, 0.50, 0.06)  # a larger mean than LOW's, but not in every part


@pytest.mark.parametrize(
    ("values", "less", "expected"),
    [
        ({"a": LOW}, True, ""),
        (
            {"a": LOW, "b": HIGH},
            True,
            "a has the smallest mean x, 0.250. The difference from each other SAE is significant (paired t-test over "
            "4 parts at level 0.05)." + SEED,
        ),
        (
            {"a": LOW, "b": HIGH},
            False,
            "b has the largest mean x, 0.350. The difference from each other SAE is significant (paired t-test over "
            "4 parts at level 0.05)." + SEED,
        ),
        ({"a": LOW, "b": LOW, "c": LOW[::-1]}, True, "All SAEs have the same mean x, 0.250."),
        (
            {"b": HIGH, "a": LOW, "c": LOW},
            True,
            "a and c have the smallest mean x, 0.250. The difference from each other SAE is significant (paired t-test "
            "over 4 parts at level 0.05, corrected for 2 comparisons)." + SEED,
        ),
        (
            {"a": LOW, "b": HIGH, "w": WIDE},
            True,
            "a has the smallest mean x, 0.250. The difference from w is not significant (paired t-test over 4 parts at "
            "level 0.05, corrected for 2 comparisons)." + SEED,
        ),
        (
            {"a": (0.2,), "b": (0.3,)},
            True,
            "a has the smallest mean x, 0.200; the significance cannot be tested, because there are fewer than two "
            "parts.",
        ),
    ],
)
def test_no_louder_than_the_figures(values: dict[str, tuple[float, ...]], less: bool, expected: str) -> None:
    assert ranking_sentence(values, figure="x", over="parts", less_is_better=less) == expected


def test_names_are_made_visible() -> None:
    assert "\u202e" not in ranking_sentence({"a\u202e": LOW, "b": HIGH}, figure="x", over="parts", less_is_better=True)
