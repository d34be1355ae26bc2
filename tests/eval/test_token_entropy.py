from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kronsae.eval import token_entropy
from kronsae.eval.token_entropy import PairSums, dense_entropies


def by_definition(unit_E: Tensor, token_E: Tensor, value_E: Tensor, units: int, vocabulary: int) -> Tensor:
    """``-sum p ln p`` from the dense table, one unit at a time."""
    table_UV = torch.zeros(units, vocabulary, dtype=torch.float64)
    table_UV.index_put_((unit_E, token_E), value_E.double(), accumulate=True)
    entropies = []
    for sums_V in table_UV:
        p_V = sums_V[sums_V > 0] / sums_V.sum()
        entropies.append(float(-(p_V * p_V.log()).sum()) if len(p_V) else math.nan)
    return torch.tensor(entropies, dtype=torch.float64)


def entries(number: int, units: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    unit_E = torch.randint(units, (number,), generator=generator) ** 2 // units  # the first ones more often
    token_E = torch.randint(vocabulary, (number,), generator=generator)
    return unit_E, token_E, torch.rand(number, generator=generator) + 0.01


def test_by_hand() -> None:
    sums = PairSums(4, 10)
    # unit 0: token 3 alone; unit 1: tokens 1 and 2 in equal parts; unit 2: 1/4, 1/4, 1/2; unit 3 is never active
    units, tokens, values = [0, 1, 1, 2, 2, 0, 2, 1], [3, 1, 2, 0, 1, 3, 9, 2], [5.0, 2, 1, 1, 1, 0.5, 2, 1]
    assert sums.add(torch.tensor(units), torch.tensor(tokens), torch.tensor(values))
    found = sums.entropies()
    assert found[:3].tolist() == pytest.approx([0, math.log(2), 1.5 * math.log(2)], abs=1e-12)
    assert found[3].isnan()


@pytest.mark.parametrize("buffer", [1, 40, 10_000])
def test_streaming_equals_the_definition(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_entropy, "BUFFER", buffer)
    unit_E, token_E, value_E = entries(3000, 100, 37)
    sums = PairSums(100, 37)
    for part in torch.arange(3000).split(70):
        sums.add(unit_E[part], token_E[part], value_E[part])
    expected = by_definition(unit_E, token_E, value_E, 100, 37)
    torch.testing.assert_close(sums.entropies(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert sums.num_pairs == len(set(zip(unit_E.tolist(), token_E.tolist(), strict=True)))


def test_once_full_it_stays_exact_for_the_batches_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_entropy, "BUFFER", 50)
    unit_E, token_E, value_E = entries(2000, 30, 40)
    sums, taken = PairSums(30, 40, max_pairs=300), 0
    for part in torch.arange(2000).split(50):
        taken += 50 * sums.add(unit_E[part], token_E[part], value_E[part])
    assert sums.full
    assert 300 < taken < 2000
    assert sums.num_pairs <= 300 + 50
    expected = by_definition(unit_E[:taken], token_E[:taken], value_E[:taken], 30, 40)
    torch.testing.assert_close(sums.entropies(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_bound_counts_pairs_and_not_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_entropy, "BUFFER", 10)
    sums = PairSums(2, 5, max_pairs=10)
    for _ in range(50):  # all ten pairs, again and again
        assert sums.add(torch.arange(2).repeat_interleave(5), torch.arange(5).repeat(2), torch.ones(10))
    assert not sums.full
    assert sums.entropies().tolist() == pytest.approx([math.log(5)] * 2)


def test_keys_too_large_to_be_packed_are_sorted_as_well() -> None:
    keys = np.random.default_rng(0).integers(0, 2**62, 100)
    keys[50:] = keys[:50]
    found, order = token_entropy._sorted(keys)
    expected = np.argsort(keys, kind="stable")
    assert (order == expected).all()
    assert (found == keys[expected]).all()
    small, small_order = token_entropy._sorted(keys % 7)
    assert (small_order == np.argsort(keys % 7, kind="stable")).all()
    assert (small == np.sort(keys % 7)).all()


def test_the_dense_table_gives_the_same() -> None:
    unit_E, token_E, value_E = entries(500, 12, 9)
    table_VU = torch.zeros(9, 12, dtype=torch.float64).index_put_((token_E, unit_E), value_E.double(), accumulate=True)
    expected = by_definition(unit_E, token_E, value_E, 12, 9)
    torch.testing.assert_close(dense_entropies(table_VU), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
