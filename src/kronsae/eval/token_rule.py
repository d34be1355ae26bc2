"""Token rules: how well a logistic regression on the nearby tokens predicts whether a latent is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int64

from kronsae.core.checks import check_count, check_positive, check_seed
from kronsae.eval.firings import Firings, FlatText
from kronsae.eval.scores import Mean, balanced_accuracy, mean_of
from kronsae.support.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, kw_only=True)
class TokenRuleConfig:
    """Settings of the token rule.

    Args:
        latents: number of latents per SAE, drawn at random from those active on at least ``min_active_tokens`` tokens
            of both texts.
        chosen: indices of latents to use instead, in every SAE.
        tokens: maximum number of tokens of the training text and of the held-out text.
        examples: maximum number of places where the latent is active, and of places where it is not, per text.
        near: tokens up to this distance on either side are features with their offset.
        radius: tokens up to this distance are features with their side only.
        inverse_penalty: C of the logistic regression: penalty ``|w|^2 / (2 C)`` plus the sum of log losses.
        min_active_tokens: latents active on fewer tokens are not drawn.
        seed: seed of the choice of latents and places.
    """

    latents: int = 100
    chosen: tuple[int, ...] = ()
    tokens: int = 200_000
    examples: int = 500
    near: int = 3
    radius: int = 15
    inverse_penalty: float = 1.0
    min_active_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latents", "tokens", "examples", "min_active_tokens"):
            check_count(name, getattr(self, name))
        check_positive("inverse_penalty", self.inverse_penalty)
        check_seed(self.seed)
        if self.near < 0:
            raise UserError(f"near must be at least 0; got {self.near!r}.")
        if self.radius < self.near:
            raise UserError(f"radius must be at least near; got {self.radius} with near={self.near}.")
        if len(set(self.chosen)) != len(self.chosen) or any(latent < 0 for latent in self.chosen):
            raise UserError(f"latents must be distinct indices from 0; got {', '.join(map(str, self.chosen))}.")


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """Held-out scores of the rule of one latent.

    Args:
        latent: index of the latent.
        balanced_accuracy: balanced accuracy of predicting "active" at probability above 0.5.
        auc: area under the ROC curve: the probability that an active place is ranked above an inactive one.
        learned_from: number of active training places, and of inactive ones.
        tested_on: number of active held-out places, and of inactive ones.
        problem: the reason why there are no scores; "" if there are.
    """

    latent: int
    balanced_accuracy: float | None = None
    auc: float | None = None
    learned_from: int = 0
    tested_on: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The rules of one SAE's latents.

    Args:
        sae: name of the SAE.
        latents: the rules, ordered by latent.
        living: number of latents of the SAE that are active in both texts.
        eligible: number of latents active on at least ``min_active_tokens`` tokens of both texts.
        balanced_accuracy, auc: means over the latents that have the score.
    """

    sae: str
    latents: tuple[TokenRule, ...]
    living: int
    eligible: int
    balanced_accuracy: Mean
    auc: Mean


def token_rule(train: tuple[FlatText, Firings], test: tuple[FlatText, Firings], config: TokenRuleConfig) -> TokenRule:
    """Fit a rule for when a latent is active on one text, and test it on another.

    The features of a place are indicators of the tokens around it: for each offset up to ``near`` the token at that
    offset, and for each side the set of tokens up to ``radius`` away. The rule is a logistic regression on these
    features, fitted on equal numbers of active and inactive places. Features that did not occur in training are
    ignored.

    Args:
        train: a text, and the latent's activations in it.
        test: a text of other documents, and the latent's activations in it.
        config: settings.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    latent = train[1].latent
    rng = np.random.default_rng([config.seed, latent])
    places, truth = _places(*train, config.examples, rng)
    test_places, test_truth = _places(*test, config.examples, rng)
    found = TokenRule(latent=latent, learned_from=len(truth) // 2, tested_on=len(test_truth) // 2)
    if not found.learned_from or not found.tested_on:
        return replace(found, problem="not both active and inactive in both texts")
    x, columns = _features(train[0], places, config, None)
    x_test, _ = _features(test[0], test_places, config, columns)
    rule = LogisticRegression(C=config.inverse_penalty, max_iter=1000).fit(x, truth)
    odds = rule.decision_function(x_test)
    called = odds > 0
    return replace(
        found,
        balanced_accuracy=balanced_accuracy(
            true_positives=int((called & test_truth).sum()),
            positives=int(test_truth.sum()),
            true_negatives=int((~called & ~test_truth).sum()),
            negatives=int((~test_truth).sum()),
        ),
        auc=float(roc_auc_score(test_truth, odds)),
    )


def summarise_rules(sae: str, rules: Sequence[TokenRule], *, living: int, eligible: int) -> TokenRules:
    """Collect the rules of an SAE's latents, with the means over them."""
    return TokenRules(
        sae=sae,
        latents=tuple(sorted(rules, key=lambda rule: rule.latent)),
        living=living,
        eligible=eligible,
        balanced_accuracy=mean_of(rule.balanced_accuracy for rule in rules),
        auc=mean_of(rule.auc for rule in rules),
    )


def _places(
    text: FlatText, firings: Firings, examples: int, rng: np.random.Generator
) -> tuple[Int64[np.ndarray, " E"], Bool[np.ndarray, " E"]]:
    """Draw equal numbers of active and inactive places, up to ``examples`` each; return places and labels."""
    silent = np.setdiff1d(text.kept_N, firings.places_E, assume_unique=True)
    number = min(examples, len(firings.places_E), len(silent))
    active = rng.choice(firings.places_E, number, replace=False)
    places = np.concatenate([active, rng.choice(silent, number, replace=False)])
    return places, np.arange(len(places)) < number


def _features(
    text: FlatText,
    places_E: Int64[np.ndarray, " E"],
    config: TokenRuleConfig,
    columns: Int64[np.ndarray, " C"] | None,
) -> tuple[csr_array, Int64[np.ndarray, " C"]]:
    """Return the indicator matrix, one row per place and one column per (slot, token), and the columns.

    Slots: 0 for the tokens before, 1 for those after, then one per offset from ``-near`` to ``near``. A (slot, token)
    has the number ``token * slots + slot``; unlike hashing, this has no collisions. ``columns`` are the known numbers,
    sorted; None takes those of these places.
    """
    from scipy.sparse import csr_array

    offsets_O = np.arange(-config.radius, config.radius + 1)
    where_EO = places_E[:, None] + offsets_O
    inside_EO = (where_EO >= text.start_L[places_E, None]) & (where_EO < text.stop_L[places_E, None])
    ids_EO = text.ids_L[np.clip(where_EO, 0, len(text.ids_L) - 1)].astype(np.int64)
    slots = 2 + 2 * config.near + 1
    sides = inside_EO & (offsets_O != 0)
    near = inside_EO & (np.abs(offsets_O) <= config.near)
    side_O, near_O = (offsets_O > 0).astype(np.int64), 2 + offsets_O + config.near
    rows = np.concatenate([np.nonzero(mask)[0] for mask in (sides, near)])
    pairs = np.concatenate([(ids_EO * slots + slot_O)[mask] for slot_O, mask in ((side_O, sides), (near_O, near))])
    if columns is None:
        columns = np.unique(pairs)
    found = np.minimum(np.searchsorted(columns, pairs), len(columns) - 1)
    known = columns[found] == pairs
    shape = (len(places_E), len(columns))
    matrix = csr_array((np.ones(int(known.sum())), (rows[known], found[known])), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0  # indicators, not counts
    return matrix, columns
