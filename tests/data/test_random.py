"""Test permutations that depend only on a seed and a purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from kronsae.data.random import SMALL, LazyPermutation, permutation


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 3 * SMALL), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_a_lazy_permutation_is_a_bijection(count: int, seed: int, epoch: int) -> None:
    found = LazyPermutation(count, seed, "test", epoch).part(0, count)
    assert np.array_equal(np.sort(found), np.arange(count))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 2 * SMALL), data=st.data())
def test_parts_of_a_lazy_permutation_are_the_whole(count: int, data: st.DataObject) -> None:
    order = LazyPermutation(count, 5, "test")
    cut = data.draw(st.integers(0, count))
    assert np.array_equal(np.concatenate([order.part(0, cut), order.part(cut, count)]), order.part(0, count))


def test_positions_and_elements_of_a_lazy_permutation_are_independent() -> None:
    """Two-sided chi-square test at 1e-6 of (decile of the position, decile of the element), with exact margins."""
    count, orders, cells = SMALL + 904, 60, 10
    table = np.zeros((cells, cells))
    for seed in range(orders):
        found = LazyPermutation(count, seed, "test").part(0, count)
        np.add.at(table, (np.arange(count) * cells // count, found * cells // count), 1)
    expected = orders * count / cells**2
    statistic = ((table - expected) ** 2).sum() / expected * (count - 1) / count  # of a random permutation table
    free = (cells - 1) ** 2
    assert chi2.ppf(1e-6, free) < statistic < chi2.isf(1e-6, free)


def test_adjacent_elements_of_a_lazy_permutation_are_rarely_consecutive() -> None:
    """In a random permutation the number of adjacent differences of +1 or -1 is Poisson with mean 2."""
    near, orders, count = 0, 100, SMALL + 913
    for seed in range(orders):
        steps = np.diff(LazyPermutation(count, seed, "test").part(0, count))
        near += int((np.abs(steps) == 1).sum())
    assert abs(near - 2 * orders) < 6 * (2 * orders) ** 0.5


def test_a_short_lazy_permutation_is_uniform() -> None:
    """Two-sided chi-square test at 1e-6 of the frequencies of all 120 orders of five elements."""
    orders, table = 6000, np.zeros((5,) * 5)
    for seed in range(orders):
        table[tuple(LazyPermutation(5, seed, "test").part(0, 5))] += 1
    expected = orders / 120
    statistic = ((table[table > 0] - expected) ** 2).sum() / expected + (120 - (table > 0).sum()) * expected
    assert chi2.ppf(1e-6, 119) < statistic < chi2.isf(1e-6, 119)


def test_a_part_of_a_huge_order_takes_no_more_than_itself() -> None:
    count = 10**12 + 39
    order = LazyPermutation(count, 0, "test")
    found = order.part(count - 5000, count)
    assert len(np.unique(found)) == 5000
    assert 0 <= found.min() < found.max() < count
    assert abs(found.mean() / count - 0.5) < 6 * (1 / 12 / 5000) ** 0.5


@pytest.mark.parametrize("other", [(1, "a", 0), (0, "b", 0), (0, "a", 1)])
def test_seed_purpose_and_number_give_unrelated_orders(other: tuple[int, str, int]) -> None:
    count = 2000
    orders = [
        (permutation(count, *words).numpy(), LazyPermutation(count, *words).part(0, count))
        for words in ((0, "a", 0), other, (0, "a", 0))
    ]
    for one, another, again in zip(*orders, strict=True):
        assert np.array_equal(one, again)
        assert abs(np.corrcoef(one, another)[0, 1]) < 6 / count**0.5
        assert (one == another).sum() < 12


def test_orders_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    permutation(10, 0, "a")
    LazyPermutation(10, 0, "a").part(0, 10)
    assert torch.equal(before, torch.random.get_rng_state())
