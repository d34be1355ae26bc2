"""Paired differences: one rule for every verdict."""

from __future__ import annotations

import math

import pytest

from kronsae.eval.paired import Difference, paired_difference
from kronsae.support.errors import UserError


def test_by_hand() -> None:
    found = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # differences 2, 3, 1
    assert found.mean == 2
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.pairs == 3
    assert found.sign == 0  # 3.5 standard errors; of three pairs it takes 4.3
    assert str(found) == "+2.000 ± 0.577"


@pytest.mark.parametrize(("mean", "error", "sign"), [(0.27, 0.1, 0), (0.28, 0.1, 1), (-0.28, 0.1, -1), (0.0, 0.0, 0)])
def test_student_s_t_decides(mean: float, error: float, sign: int) -> None:
    assert Difference(mean=mean, standard_error=error, pairs=5).sign == sign


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_little_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(UserError, match="a and b must have equal lengths of at least 2; got"):
        paired_difference(a, b)
