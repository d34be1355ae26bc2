"""Counts over active latents, against trying every threshold, latent and pair in turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kronsae.core.codes import SparseCodes
from kronsae.eval.probing import entries as entries_module
from kronsae.eval.probing.entries import Entries, best_thresholds, mean_difference, scores
from kronsae.eval.probing.pairs import best_pair, recall_by_size


def sparse(dense_NF: np.ndarray) -> SparseCodes:
    dense = torch.tensor(dense_NF, dtype=torch.float32)
    order = torch.argsort(torch.rand(dense.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    return SparseCodes(dense.gather(1, order), order, dense.shape[1])


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations with many ties, and three concepts, on 50 tokens."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 5, (50, 9)) * (rng.random((50, 9)) < 0.4) / 2
    dense[:, 3] = 0.0  # never active
    labels = rng.random((50, 3)) < (0.2, 0.5, 0.8)
    return dense, labels


def slow_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    total = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / total) if total else 0.0


@pytest.mark.parametrize("cells", [2**23, 1, 70])
def test_best_thresholds_are_those_of_trying_all(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "CELLS", cells)
    dense, labels = random_case(0)
    other, other_labels = random_case(1)
    found = best_thresholds(Entries.of(sparse(dense)), labels)
    held_out = scores(Entries.of(sparse(other)), other_labels, found.threshold_FL)
    for latent, concept in itertools.product(range(9), range(3)):
        values = sorted({value for value in dense[:, latent] if value > 0}, reverse=True)
        tried = {value: slow_f1(dense[:, latent] >= value, labels[:, concept]) for value in values}
        best = max(tried.values(), default=0.0)
        assert found.f1_FL[latent, concept] == pytest.approx(best)
        threshold = float(found.threshold_FL[latent, concept])
        assert threshold == np.inf if not tried else tried[threshold] == pytest.approx(best)
        expected = slow_f1((other[:, latent] >= threshold) & (other[:, latent] > 0), other_labels[:, concept])
        assert held_out[latent, concept] == pytest.approx(expected)


def test_mean_difference_is_that_of_the_columns() -> None:
    dense, labels = random_case(2)
    found = mean_difference(Entries.of(sparse(dense)), labels)
    for concept in range(3):
        has = labels[:, concept]
        np.testing.assert_allclose(found[:, concept], dense[has].mean(0) - dense[~has].mean(0), atol=1e-6)


def test_a_threshold_by_hand() -> None:
    """Active at 3, 2, 2, 1 on tokens with the concept: yes, yes, no, yes; F1 at 3: 2/4, at 2: 4/6, at 1: 6/7."""
    codes = SparseCodes(torch.tensor([[3.0], [2.0], [2.0], [1.0], [0.0]]), torch.zeros(5, 1, dtype=torch.int64), 1)
    labels = np.array([[True], [True], [False], [True], [False]])
    found = best_thresholds(Entries.of(codes), labels)
    assert found.f1_FL[0, 0] == pytest.approx(6 / 7)
    assert found.threshold_FL[0, 0] == 1.0


def test_an_and_and_an_or_are_found() -> None:
    rng = np.random.default_rng(3)
    dense = (rng.random((200, 6)) < 0.5).astype(float)
    train = Entries.of(sparse(dense[:120]))
    held_out = Entries.of(sparse(dense[120:]))
    on = dense > 0
    for operation, true in (("and", on[:, 1] & on[:, 4]), ("or", on[:, 1] | on[:, 4])):
        best = best_thresholds(train, true[:120, None])
        found = best_pair(train, true[:120], held_out, true[120:], best.f1_FL[:, 0], best.threshold_FL[:, 0])
        assert found is not None
        assert (found.operation, set(found.latents), found.f1) == (operation, {1, 4}, 1.0)


def test_a_pair_may_need_a_threshold() -> None:
    """The concept is latent 0 at 2 or more, and latent 1; at any activity latent 0 says nothing."""
    rng = np.random.default_rng(4)
    dense = np.stack([rng.integers(1, 4, 300), rng.integers(0, 2, 300), rng.integers(0, 2, 300)], 1).astype(float)
    true = (dense[:, 0] >= 2) & (dense[:, 1] > 0)
    entries = Entries.of(sparse(dense))
    best = best_thresholds(entries, true[:, None])
    found = best_pair(entries, true, entries, true, best.f1_FL[:, 0], best.threshold_FL[:, 0])
    assert found is not None
    assert found.f1 == pytest.approx(max(1.0 if best.threshold_FL[0, 0] == 2.0 else 0.0, found.f1))
    assert dict(zip(found.latents, found.thresholds, strict=True))[0] == best.threshold_FL[0, 0]


def test_one_latent_is_no_pair() -> None:
    codes = SparseCodes(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64), 1)
    true = np.array([True, False, True, False])
    entries = Entries.of(codes)
    best = best_thresholds(entries, true[:, None])
    assert best_pair(entries, true, entries, true, best.f1_FL[:, 0], best.threshold_FL[:, 0]) is None


def test_recall_falls_with_the_dictionary() -> None:
    """Each of 4 concepts has one latent of 32 that tells it: a half of the dictionary knows half of them."""
    train = np.zeros((32, 4))
    train[[3, 9, 20, 31], range(4)] = 1.0
    held_out = train * np.array([0.9, 0.8, 0.6, 0.4])
    rows = recall_by_size(train, held_out, bars=(0.5, 0.7), draws=400, seed=0)
    assert [row["latents"] for row in rows] == [32, 16, 8, 4, 2]
    assert (rows[0]["recall_0.5"], rows[0]["recall_0.7"]) == (0.75, 0.5)
    for row in rows[1:]:
        assert row["recall_0.5"] == pytest.approx(0.75 * row["latents"] / 32, abs=0.05)
    assert rows == recall_by_size(train, held_out, bars=(0.5, 0.7), draws=400, seed=0)
