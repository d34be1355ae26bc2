"""RV, ranks and matching, against cases worked out by hand and against all permutations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kronsae.eval.known_covariance import (
    effective_rank,
    gram,
    match_by_direction,
    match_by_structure,
    mean_correlation,
    permuted_rv,
    recovery,
    rv_coefficient,
)
from kronsae.support.errors import UserError

ONES = torch.ones(2, 2)


def test_rv_by_hand() -> None:
    assert rv_coefficient(torch.eye(2), ONES) == pytest.approx(2 / math.sqrt(2 * 4))
    assert rv_coefficient(ONES, 7 * ONES) == pytest.approx(1)
    with pytest.raises(UserError, match=r"the matrices must have equal shapes; got \(2, 2\) and \(3, 3\)"):
        rv_coefficient(ONES, torch.eye(3))


def test_permuted_rv_is_the_mean_over_all_orders() -> None:
    truth, found = gram(torch.randn(4, 3)), gram(torch.randn(4, 2))
    orders = [list(order) for order in itertools.permutations(range(4))]
    values = [rv_coefficient(truth[order][:, order], found) for order in orders]
    assert permuted_rv(truth, found) == pytest.approx(sum(values) / len(values))


def test_effective_rank_by_hand() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(ONES) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)  # shares 3/4, 1/4


def test_mean_correlation_by_hand() -> None:
    matrix = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # one correlation, of -1/2
    assert mean_correlation(matrix) == pytest.approx(0.5 / 3)


def test_gram_scales_rows_and_keeps_zeros() -> None:
    found = gram(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0]], dtype=torch.float64))


def test_matching_finds_a_planted_order() -> None:
    reference = torch.randn(12, 6)
    order = torch.randperm(12)
    shuffled = reference[order]
    assert torch.equal(match_by_direction(reference, shuffled), order.argsort())
    assert torch.equal(match_by_structure(reference, shuffled), order.argsort())


def test_matching_by_direction_is_the_best_of_all() -> None:
    reference, rows = torch.randn(5, 3), torch.randn(5, 3)
    unit = [torch.nn.functional.normalize(one, dim=1) for one in (reference, rows)]
    best = max(float((unit[0] * unit[1][list(order)]).sum()) for order in itertools.permutations(range(5)))
    assert float((unit[0] * unit[1][match_by_direction(reference, rows)]).sum()) == pytest.approx(best, abs=1e-6)


def test_matching_by_structure_does_not_see_the_directions() -> None:
    reference = torch.randn(10, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    assert torch.equal(match_by_structure(reference, reference @ rotation), torch.arange(10))
    with pytest.raises(UserError, match=r"shape \(10, 4\); got \(9, 4\)"):
        match_by_structure(reference, reference[:9])


def test_recovery_of_the_truth_itself() -> None:
    reference = torch.randn(8, 5)
    truth, order = gram(reference), torch.randperm(8)
    found = recovery(reference[order] * 3, reference, truth)
    assert (found.rv, found.rv_by_direction, found.mean_cosine) == pytest.approx((1, 1, 1))
    assert found.rank_difference == pytest.approx(0, abs=1e-6)
    assert found.rv_permuted < 1
    unmatched = recovery(reference[order], reference, truth, in_order=True)
    assert unmatched.rv == pytest.approx(rv_coefficient(truth, gram(reference[order])))
    assert unmatched.rv == unmatched.rv_by_direction
    assert unmatched.mean_cosine < 1
