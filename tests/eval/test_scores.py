from __future__ import annotations

import math

import pytest

from kronsae.eval.scores import Mean, balanced_accuracy, mean_of


def test_balanced_accuracy_by_hand() -> None:
    found = balanced_accuracy(true_positives=3, positives=4, true_negatives=1, negatives=10)
    assert found == pytest.approx((0.75 + 0.1) / 2)


def test_always_yes_is_a_guess_whatever_the_shares() -> None:
    assert balanced_accuracy(true_positives=90, positives=90, true_negatives=0, negatives=10) == 0.5


@pytest.mark.parametrize(("positives", "negatives"), [(0, 5), (5, 0), (0, 0)])
def test_without_both_kinds_there_is_none(positives: int, negatives: int) -> None:
    assert balanced_accuracy(true_positives=0, positives=positives, true_negatives=0, negatives=negatives) is None


def test_mean_by_hand() -> None:
    found = mean_of([0.5, None, 1.0, 0.9])
    assert found.n == 3
    assert found.mean == pytest.approx(0.8)
    assert found.std == pytest.approx(math.sqrt((0.09 + 0.04 + 0.01) / 2))


def test_mean_of_one_and_of_none() -> None:
    assert mean_of([None, 0.25]) == Mean(mean=0.25, std=None, n=1)
    assert mean_of([None]) == Mean(mean=None, std=None, n=0)
