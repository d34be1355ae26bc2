"""Test that the relations between the known features hold for every token."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from kronsae.data.synthetic import ACTIVATIONS, SyntheticActivations, SyntheticConfig, mean_l0
from kronsae.support.errors import UserError

SMALL = SyntheticConfig(
    d_in=10, independent=24, group_size=4, roots=5, branching=3, conjunctions=9, p_max=0.3, p_min=0.1
)


def test_x_is_the_sum_of_its_features() -> None:
    features = SMALL.build()
    x, activations = features.sample(50, held_out=False, number=0)
    assert torch.equal(x, activations @ features.directions_GD)
    assert torch.allclose(features.directions_GD.norm(dim=1), torch.ones(SMALL.features))
    assert activations.shape == (50, SMALL.features)
    assert float(activations[activations > 0].min()) >= 1


def test_the_kinds_divide_the_features() -> None:
    kinds = SMALL.build().kinds
    assert torch.cat(list(kinds.values())).tolist() == list(range(SMALL.features))
    assert [len(kinds[kind]) for kind in ("independent", "root", "child", "conjunction")] == [24, 5, 15, 9]


def test_a_conjunction_is_on_exactly_with_both_parents() -> None:
    features = SMALL.build()
    on = features.sample(500, held_out=False, number=0)[1] > 0
    edges = features.edges["conjunction"]
    for feature in features.kinds["conjunction"].tolist():
        one, other = edges[edges[:, 1] == feature][:, 0].tolist()
        assert one != other
        assert one // SMALL.group_size == other // SMALL.group_size
        assert torch.equal(on[:, feature], on[:, one] & on[:, other])
    assert len({tuple(pair) for pair in features.parents_Q2.tolist()}) == SMALL.conjunctions
    assert int(on[:, features.kinds["conjunction"]].sum()) > 0


def test_a_child_is_on_only_with_its_root_and_alone_among_its_siblings() -> None:
    features = SMALL.build()
    on = features.sample(500, held_out=False, number=0)[1] > 0
    edges = features.edges["hierarchy"]
    assert bool((on[:, edges[:, 0]] | ~on[:, edges[:, 1]]).all())
    for root in features.kinds["root"].tolist():
        children = on[:, edges[edges[:, 0] == root][:, 1]]
        assert children.shape[1] == SMALL.branching
        assert set(children.sum(1).tolist()) == {0, 1}
        share = float(children.any(1).sum() / on[:, root].sum())
        assert share == pytest.approx(3 / 4, abs=0.15)


def test_firing_has_its_probabilities_and_groups_fire_together() -> None:
    features = SMALL.build()
    on = features.sample(20_000, held_out=False, number=0)[1] > 0
    independent = on[:, :24].double()
    assert torch.allclose(independent.mean(0), features.probability_I.double(), atol=0.015)
    assert torch.allclose(on[:, features.kinds["root"]].double().mean(0), features.probability_R.double(), atol=0.015)
    correlation = torch.corrcoef(independent.T)
    same_group = torch.block_diag(*[torch.ones(4, 4)] * 6).bool() & ~torch.eye(24).bool()
    other_group = ~torch.block_diag(*[torch.ones(4, 4)] * 6).bool()
    assert float(correlation[same_group].min()) > 0.3
    assert float(correlation[other_group].abs().max()) < 0.05


def test_zipf() -> None:
    probability = SMALL.build().probability_I.sort(descending=True).values
    expected = (0.3 * torch.arange(1, 25, dtype=torch.float64) ** -0.5).clamp_min(0.1).float()
    assert torch.equal(probability, expected)


def test_every_batch_is_its_own_and_can_be_made_again() -> None:
    whole = list(itertools.islice(SyntheticActivations(SMALL.build(), batch=6), 4))
    rest = list(itertools.islice(SyntheticActivations(SMALL.build(), batch=6, state=whole[0][1]), 3))
    assert all(torch.equal(a[0][ACTIVATIONS], b[0][ACTIVATIONS]) for a, b in zip(whole[1:], rest, strict=True))
    features = SMALL.build()
    batches = [features.sample(6, held_out=held_out, number=n)[1] for held_out in (False, True) for n in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))
    other = replace(SMALL, seed=1).build()
    assert not torch.equal(other.directions_GD, features.directions_GD)


def test_mean_l0_by_counting() -> None:
    features = SMALL.build()
    counted = (features.sample(300, held_out=True, number=0)[1] > 0).sum() / 300
    assert mean_l0(features, 300) == pytest.approx(float(counted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 0}, "d_in must be a whole number above 0"),
        ({"independent": 25}, "multiple of group_size; got 25 with group_size=4"),
        ({"conjunctions": 37}, "at most the number of pairs within groups, 36; got 37"),
        ({"conjunctions": -1}, "conjunctions and seed must be at least 0; got -1 and 0"),
        ({"correlation": 1.0}, r"correlation must be in \[0, 1\)"),
        ({"p_min": 0.5}, r"p_min and p_max must satisfy 0 < p_min <= p_max < 1; got 0\.5 and "),
        ({"zipf_exponent": -1.0}, "zipf_exponent must be finite"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_no_conjunctions_at_all() -> None:
    features = replace(SMALL, conjunctions=0).build()
    assert features.edges["conjunction"].shape == (0, 2)
    assert features.sample(5, held_out=False, number=0)[1].shape == (5, SMALL.features - 9)
