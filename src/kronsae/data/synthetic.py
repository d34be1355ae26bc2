"""Generate synthetic activations from known features, which an SAE should recover.

``x = sum_g a_g d_g`` with unit directions ``d_g`` in superposition and activations ``a_g >= 0``. There are three kinds
of features: independent features (correlated within groups), hierarchies (a child is active only if its root is) and
conjunctions (active exactly when both of their parents are).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, count
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.data.random import generator_for
from kronsae.data.stream import State
from kronsae.support.errors import UserError

ACTIVATIONS = "activations"
"""Hook name of the synthetic activations."""


class KnownFeatures(Protocol):
    """A source of activations with known features.

    ``kinds`` partitions the features. ``edges`` maps each kind of relation to pairs ``(parent, child)``: the parent is
    active whenever the child is.
    """

    @property
    def directions_GD(self) -> Float[Tensor, "G D"]: ...

    @property
    def kinds(self) -> Mapping[str, Int[Tensor, " C"]]: ...

    @property
    def edges(self) -> Mapping[str, Int[Tensor, "E 2"]]: ...

    def sample(self, tokens: int, *, held_out: bool, number: int) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B G"]]:
        """Return x and the true activations of batch ``number`` of the training or held-out tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Numbers, probabilities and correlations of the synthetic features.

    Args:
        d_in: D, width of the activations. It is smaller than the number of features, so that directions overlap.
        independent: Number of independent features. Each has its own probability of being active.
        group_size: Features in a group. Their activity is correlated within a group and independent across groups.
        correlation: Correlation of the Gaussians that determine activity within a group (a Gaussian copula, which
            preserves each feature's probability).
        roots: Number of hierarchies.
        branching: Children of each root. If the root is active, one child or none is, each with equal probability.
        conjunctions: Number of features with two parents, which belong to one group. No two have the same parents.
        zipf_exponent: The probability of the i-th most frequent feature is proportional to ``i^-zipf_exponent``.
        p_max: Probability of the most frequent independent feature and of the most frequent root.
        p_min: Lower bound of all probabilities.
        magnitude_spread: An active feature has the activation ``1 + magnitude_spread * |normal|``.
        seed: Seed of the directions, probabilities, relations and tokens.
    """

    d_in: int = 96
    independent: int = 256
    group_size: int = 8
    correlation: float = 0.8
    roots: int = 32
    branching: int = 3
    conjunctions: int = 128
    zipf_exponent: float = 0.5
    p_max: float = 0.15
    p_min: float = 0.01
    magnitude_spread: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_in", "independent", "group_size", "roots", "branching"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be a whole number above 0; got {getattr(self, name)!r}.")
        if self.conjunctions < 0 or self.seed < 0:
            raise UserError(f"conjunctions and seed must be at least 0; got {self.conjunctions} and {self.seed}.")
        if self.independent % self.group_size:
            raise UserError(
                f"independent must be a multiple of group_size; got {self.independent} with group_size="
                f"{self.group_size}. Change one of them."
            )
        groups = self.independent // self.group_size
        if self.conjunctions > groups * math.comb(self.group_size, 2):
            raise UserError(
                "conjunctions must be at most the number of pairs within groups, "
                f"{groups * math.comb(self.group_size, 2)}; got {self.conjunctions}. Lower it, or increase group_size."
            )
        if not 0 <= self.correlation < 1:
            raise UserError(f"correlation must be in [0, 1); got {self.correlation!r}.")
        if not 0 < self.p_min <= self.p_max < 1:
            raise UserError(f"p_min and p_max must satisfy 0 < p_min <= p_max < 1; got {self.p_min} and {self.p_max}.")
        for name in ("zipf_exponent", "magnitude_spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and at least 0; got {getattr(self, name)!r}.")

    @property
    def features(self) -> int:
        """G, the number of features of all kinds."""
        return self.independent + self.roots * (1 + self.branching) + self.conjunctions

    def build(self) -> SyntheticFeatures:
        """Return the generator of these features."""
        return SyntheticFeatures(self)


class SyntheticFeatures:
    """Generate the features of a `SyntheticConfig`, ordered as independent ones, roots, children, conjunctions."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        generator = generator_for(config.seed, "known features")
        directions_GD = torch.randn(config.features, config.d_in, generator=generator)
        self.directions_GD = torch.nn.functional.normalize(directions_GD, dim=1)
        self.probability_I = self._zipf(config.independent, generator)
        self.probability_R = self._zipf(config.roots, generator)
        first_root = config.independent
        first_child = first_root + config.roots
        first_conjunction = first_child + config.roots * config.branching
        self.kinds = {
            "independent": torch.arange(first_root),
            "root": torch.arange(first_root, first_child),
            "child": torch.arange(first_child, first_conjunction),
            "conjunction": torch.arange(first_conjunction, config.features),
        }
        roots = self.kinds["root"].repeat_interleave(config.branching)
        self.parents_Q2 = self._parents(generator)
        both = self.kinds["conjunction"].unsqueeze(1).expand(-1, 2)
        self.edges = {
            "hierarchy": torch.stack([roots, self.kinds["child"]], dim=1),
            "conjunction": torch.stack([self.parents_Q2, both], dim=2).flatten(0, 1),
        }

    def _zipf(self, number: int, generator: torch.Generator) -> Tensor:
        """Return the probabilities of being active, in random order."""
        rank = torch.arange(1, number + 1, dtype=torch.float64)
        probability = (self.config.p_max * rank**-self.config.zipf_exponent).clamp_min(self.config.p_min)
        return probability[torch.randperm(number, generator=generator)].float()

    def _parents(self, generator: torch.Generator) -> Tensor:
        """Return two different features of one group for each conjunction; groups are used in rotation."""
        config = self.config
        groups = config.independent // config.group_size
        pairs_P2 = torch.tensor(list(combinations(range(config.group_size), 2)), dtype=torch.int64).reshape(-1, 2)
        chosen = []
        for group in range(groups):
            own = len(range(group, config.conjunctions, groups))
            order = torch.randperm(len(pairs_P2), generator=generator)[:own]
            chosen.append(pairs_P2[order] + group * config.group_size)
        return torch.cat(chosen)

    def sample(self, tokens: int, *, held_out: bool, number: int) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B G"]]:
        """Return x and the true activations of batch ``number`` of the training or held-out tokens."""
        purpose = "held-out tokens" if held_out else "training tokens"
        generator = generator_for(self.config.seed, purpose, number)
        on_BG = self._firing(tokens, generator)
        magnitude_BG = torch.randn(on_BG.shape, generator=generator).abs_().mul_(self.config.magnitude_spread).add_(1)
        activations_BG = magnitude_BG * on_BG
        return activations_BG @ self.directions_GD, activations_BG

    def _firing(self, tokens: int, generator: torch.Generator) -> Tensor:
        config = self.config
        own_BI = torch.randn(tokens, config.independent, generator=generator)
        shared_BI = torch.randn(tokens, config.independent // config.group_size, generator=generator)
        shared_BI = shared_BI.repeat_interleave(config.group_size, dim=1)
        z_BI = math.sqrt(config.correlation) * shared_BI + math.sqrt(1 - config.correlation) * own_BI
        on_BI = z_BI > torch.special.ndtri(1 - self.probability_I)
        on_BR = torch.rand(tokens, config.roots, generator=generator) < self.probability_R
        which_BR = torch.randint(config.branching + 1, (tokens, config.roots), generator=generator)
        on_BRC = on_BR.unsqueeze(2) & (which_BR.unsqueeze(2) == torch.arange(config.branching))
        on_BQ = on_BI[:, self.parents_Q2].all(dim=2)
        return torch.cat([on_BI, on_BR, on_BRC.flatten(1), on_BQ], dim=1)


class SyntheticActivations:
    """Yield ``({ACTIVATIONS: [batch, D]}, {"batch": number})``, with newly generated tokens in every batch.

    Args:
        features: Source of the activations.
        batch: Tokens in each batch.
        state: State of the last batch used; None starts at the first batch.
    """

    def __init__(self, features: KnownFeatures, *, batch: int, state: State | None = None) -> None:
        self.features, self.batch = features, batch
        self.start = 0 if state is None else state["batch"] + 1

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], State]]:
        for number in count(self.start):
            yield {ACTIVATIONS: self.features.sample(self.batch, held_out=False, number=number)[0]}, {"batch": number}


def mean_l0(features: KnownFeatures, tokens: int = 8192) -> float:
    """Return the mean number of active features per token, over ``tokens`` held-out tokens."""
    _, activations_BG = features.sample(tokens, held_out=True, number=0)
    return float((activations_BG > 0).sum(1).double().mean())
