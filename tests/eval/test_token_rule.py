"""Test that the rule detects dependence on tokens, and none if there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kronsae.eval.firings import Firings, FlatText
from kronsae.eval.token_rule import TokenRule, TokenRuleConfig, _features, summarise_rules, token_rule
from kronsae.support.errors import UserError

ROWS, LENGTH, VOCABULARY = 150, 40, 60
CONFIG = TokenRuleConfig(examples=200, radius=6)


def text(seed: int) -> FlatText:
    """Random tokens of a small vocabulary, evenly drawn; token 0 begins each window and does not count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    ids[:, 0] = 0
    starts = np.repeat(np.arange(ROWS) * LENGTH, LENGTH)
    places = np.arange(ROWS * LENGTH)
    return FlatText(ids.reshape(-1), starts, starts + LENGTH, places[ids.reshape(-1) > 0])


def rule(active: Any, **changes: Any) -> TokenRule:
    """``active`` says of a text's ids and places at which of its kept places the latent is on."""
    both = []
    for seed in (1, 2):
        where = text(seed)
        places = where.kept_N[active(where, where.kept_N, np.random.default_rng(seed + 10))]
        both.append((where, Firings(5, places, np.ones(len(places), dtype=np.float32))))
    return token_rule(both[0], both[1], TokenRuleConfig(**{"examples": 200, "radius": 6, **changes}))


def test_a_latent_of_one_token_is_told() -> None:
    found = rule(lambda where, kept, _: np.isin(where.ids_L[kept], (3, 4)))
    assert found.balanced_accuracy is not None
    assert found.auc is not None
    assert found.balanced_accuracy > 0.97
    assert found.auc > 0.99
    assert found.latent == 5
    assert found.problem == ""


def test_a_latent_of_the_token_before_is_told() -> None:
    found = rule(lambda where, kept, _: np.isin(where.ids_L[kept - 1], (3, 4)))
    assert found.balanced_accuracy is not None
    assert found.balanced_accuracy > 0.97


def test_the_offset_is_what_tells() -> None:
    """Known only as one of six tokens before, the token right before tells less."""
    near = rule(lambda where, kept, _: np.isin(where.ids_L[kept - 1], (3, 4))).auc
    side = rule(lambda where, kept, _: np.isin(where.ids_L[kept - 1], (3, 4)), near=0).auc
    assert near is not None
    assert side is not None
    assert 0.6 < side < near - 0.05


def test_a_token_somewhere_before_is_told_by_its_side() -> None:
    def five_before(where: FlatText, kept: np.ndarray, _: Any) -> Any:
        inside = kept - 5 >= where.start_L[kept]
        return inside & np.isin(where.ids_L[np.maximum(kept - 5, 0)], (3, 4))

    found = rule(five_before).auc
    assert found is not None
    assert found > 0.75


def test_a_random_set_of_places_is_not_told() -> None:
    found = rule(lambda where, kept, rng: rng.random(len(kept)) < 0.1, examples=400)
    assert found.balanced_accuracy == pytest.approx(0.5, abs=0.06)
    assert found.auc == pytest.approx(0.5, abs=0.06)


def test_sizes_and_seed() -> None:
    one, same, other = (rule(lambda where, kept, _: where.ids_L[kept] < 20, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.auc != other.auc
    assert (one.learned_from, one.tested_on) == (200, 200)
    few = rule(lambda where, kept, _: np.arange(len(kept)) < 30)
    assert (few.learned_from, few.tested_on) == (30, 30)


@pytest.mark.parametrize("share", [0, 1])
def test_a_latent_never_or_always_active_has_no_rule(share: int) -> None:
    found = rule(lambda where, kept, _: np.full(len(kept), bool(share)))
    assert found.balanced_accuracy is None
    assert found.auc is None
    assert found.problem == "not both active and inactive in both texts"


def test_features_by_hand() -> None:
    """Window 8 9 8 7 | 5: slots are before, after, -1, 0, +1; numbers are token * 5 + slot."""
    starts = np.array([0, 0, 0, 0, 4])
    where = FlatText(np.array([8, 9, 8, 7, 5], dtype=np.int32), starts, np.array([4, 4, 4, 4, 5]), np.arange(5))
    config = TokenRuleConfig(near=1, radius=2)
    matrix, columns = _features(where, np.array([2, 4]), config, None)
    expected = [{8 * 5, 9 * 5, 7 * 5 + 1, 9 * 5 + 2, 8 * 5 + 3, 7 * 5 + 4}, {5 * 5 + 3}]
    dense = matrix.toarray()
    assert [set(columns[row > 0].tolist()) for row in dense] == expected
    assert set(dense.ravel().tolist()) == {0.0, 1.0}
    again, _ = _features(where, np.array([0, 4]), config, columns)  # at 0 after it: 9 and 8, at it: 8
    assert set(columns[again.toarray()[0] > 0].tolist()) == {8 * 5 + 3}


def test_a_summary_by_hand() -> None:
    rules = [TokenRule(latent=2, balanced_accuracy=0.5, auc=0.25), TokenRule(latent=1, auc=0.75), TokenRule(latent=0)]
    found = summarise_rules("a", rules, living=9, eligible=5)
    assert [rule.latent for rule in found.latents] == [0, 1, 2]
    assert (found.auc.mean, found.auc.n, found.balanced_accuracy.n) == (0.5, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"near": 4, "radius": 3}, "radius must be at least near; got 3 with near=4"),
        ({"inverse_penalty": 0.0}, "inverse_penalty must be above 0; got 0.0"),
        ({"examples": 0}, "examples must be a whole number above 0; got 0"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*63 - 1; got -1"),
        ({"chosen": (2, 2)}, "latents must be distinct indices from 0; got 2, 2"),
    ],
)
def test_a_config_that_makes_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenRuleConfig(**values)
