"""What an SAE finds of known features, against cases worked out by hand, and against sae-lens where it is there."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.eval.known_features import (
    NO_LATENT,
    KnownFeaturesMeter,
    absolute_cosines,
    absorption_counts,
    match_features,
    mean_correlation_coefficient,
    uniqueness,
)


def codes_of(dense_BF: Tensor) -> SparseCodes:
    """All places as codes: zeros are padding."""
    indices = torch.arange(dense_BF.shape[1]).expand(dense_BF.shape).contiguous()
    return SparseCodes(dense_BF, indices, dense_BF.shape[1])


def test_cosines_are_absolute_and_of_zero_rows_0() -> None:
    found = absolute_cosines(torch.tensor([[-3.0, -4.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    assert torch.allclose(found, torch.tensor([[0.8], [0.0]]))


def test_matching_is_one_to_one_and_best() -> None:
    cosine = torch.tensor([[0.9, 0.8], [0.9, 0.1], [0.0, 0.2]])
    assert match_features(cosine).tolist() == [1, 0]  # 0.9 + 0.8; the greedy choice would have 0.9 + 0.2
    assert mean_correlation_coefficient(cosine) == pytest.approx(0.85)
    random = torch.rand(4, 4)
    best = max(sum(float(random[f, g]) for g, f in enumerate(order)) for order in itertools.permutations(range(4)))
    assert mean_correlation_coefficient(random) == pytest.approx(best / 4)


def test_features_without_a_latent() -> None:
    cosine = torch.tensor([[0.1, 0.9, 0.2]])
    assert match_features(cosine).tolist() == [NO_LATENT, 0, NO_LATENT]
    assert mean_correlation_coefficient(cosine) == pytest.approx(0.9)


def test_uniqueness_by_hand() -> None:
    assert uniqueness(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.5], [0.0, 1.0]])) == 2 / 4


def test_absorption_counts_by_hand() -> None:
    edges = torch.tensor([[0, 1], [0, 2]])  # feature 0 is the parent of 1 and 2
    on = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    detected = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]]).bool()
    # 0: absorbed; 1: child and parent fire; 2: the child's latent is off; 3: missed alone; 4: found alone
    assert absorption_counts(on, detected, edges).T.tolist() == [[2, 1, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_child_that_is_off_absorbs_nothing() -> None:
    on, detected = torch.tensor([[1, 0, 1]]).bool(), torch.tensor([[0, 1, 0]]).bool()
    assert absorption_counts(on, detected, torch.tensor([[0, 1], [0, 2]]))[:, 0].tolist() == [0, 0, 0, 0]


def test_the_meter_by_hand() -> None:
    """Latents 0, 1, 2 are features 1, 0, 2; latent 3 is near feature 0 but not its own; four tokens in two batches."""
    directions = torch.eye(4)[:3]
    W_dec = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0.8, 0, 0, 0.6]])
    kinds = {"parent": torch.tensor([0]), "child": torch.tensor([1, 2])}
    meter = KnownFeaturesMeter(W_dec, directions, kinds, {"hierarchy": torch.tensor([[0, 1], [0, 2]])})
    activations = torch.tensor([[1.0, 1, 0], [2, 0, 0], [1, 0, 1], [0, 0, 0]])
    codes = torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]])
    for rows in (slice(0, 1), slice(1, 4)):
        meter.update(codes_of(codes[rows]), activations[rows])
    found = meter.value()
    assert found.mcc == pytest.approx(1)
    assert found.uniqueness == 3 / 4
    # latent (hits / fired, hits / its feature on): 0: 1/2, 1/1; 1: 2/2, 2/3; 2: 1/1, 1/1; 3: 1/2, 1/3
    assert found.precision == pytest.approx((1 / 2 + 1 + 1 + 1 / 2) / 4)
    assert found.recall == pytest.approx((1 + 2 / 3 + 1 + 1 / 3) / 4)
    assert found.f1 == pytest.approx((2 / 3 + 4 / 5 + 1 + 2 / 5) / 4)
    assert found.f1_by_kind == pytest.approx({"parent": 4 / 5, "child": (2 / 3 + 1) / 2})
    assert found.cosine_by_kind == pytest.approx({"parent": 1.0, "child": 1.0})
    hierarchy = found.absorption["hierarchy"]  # child's latent fires beside the parent: tokens 0 (absorbed) and 2
    assert (hierarchy.rate, hierarchy.missed_alone, hierarchy.parents) == (0.5, 0.0, 1)


def test_a_kind_without_features_has_no_figures() -> None:
    kinds = {"all": torch.arange(2), "none": torch.arange(0)}
    meter = KnownFeaturesMeter(torch.eye(2), torch.eye(2), kinds, {})
    meter.update(codes_of(torch.eye(2)), torch.eye(2))
    found = meter.value()
    assert (found.cosine_by_kind, found.f1_by_kind) == ({"all": 1.0}, {"all": 1.0})  # a NaN could not be kept as JSON


def test_what_was_never_seen_is_none() -> None:
    meter = KnownFeaturesMeter(torch.eye(2), torch.eye(2), {"all": torch.arange(2)}, {"x": torch.tensor([[0, 1]])})
    meter.update(codes_of(torch.zeros(3, 2)), torch.zeros(3, 2))
    found = meter.value()
    assert (found.precision, found.recall, found.f1) == (0, 0, 0)
    assert (found.absorption["x"].rate, found.absorption["x"].missed_alone) == (None, None)


@pytest.mark.parametrize(("latents", "features"), [(12, 12), (20, 9), (7, 15)])
@pytest.mark.filterwarnings("ignore")
def test_as_sae_lens_measures(latents: int, features: int) -> None:
    theirs = pytest.importorskip("sae_lens.synthetic.evals", exc_type=ImportError)
    W_dec, directions = torch.randn(latents, 6), torch.randn(features, 6)
    dense = torch.randn(300, latents).relu() * (torch.rand(300, latents) < 0.4)
    dense[:, 0] = 0  # dead
    activations = torch.rand(300, features) * (torch.rand(300, features) < 0.3)
    cosine = absolute_cosines(W_dec, directions)
    assert mean_correlation_coefficient(cosine) == pytest.approx(
        theirs.mean_correlation_coefficient(W_dec, directions), abs=1e-6
    )
    assert uniqueness(cosine) == theirs.feature_uniqueness(W_dec, directions)
    meter = KnownFeaturesMeter(W_dec, directions, {}, {})
    meter.update(codes_of(dense), activations)
    found = meter.value()
    expected = theirs.compute_classification_metrics(dense, activations, W_dec, directions)
    assert (found.precision, found.recall, found.f1) == pytest.approx(
        (expected.precision, expected.recall, expected.f1_score), abs=1e-6
    )
