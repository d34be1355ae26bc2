"""The synthetic benchmark of sae-lens as a source of known features (optional: ``pip install sae-lens``).

The settings are those of SynthSAEBench, for any number of features. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SaeLensConfig:
    """Config of SynthSAEBench; its published size is 16,384 features with d_in = 768.

    Args:
        features: number of features, G.
        d_in: width of the activations, D.
        seed: seed of the features and tokens.
    """

    features: int = 512
    d_in: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features < 128 or self.d_in < 1 or self.seed < 0:
            raise UserError(
                "features must be at least 128, d_in above 0 and seed at least 0; got "
                f"{self.features}, {self.d_in} and {self.seed}."
            )

    def build(self) -> SaeLensFeatures:
        """Create the features.

        Raises:
            UserError: sae-lens is not installed.
        """
        return SaeLensFeatures(self)


class SaeLensFeatures:
    """Features of `sae_lens.synthetic.SyntheticModel`.

    There is one hierarchy per 128 features (4 children, 3 levels, mutually exclusive); the other features are free.
    Firing probabilities follow Zipf's law (exponent 0.5, from 0.4 down to 0.0005), with a correlation matrix of rank
    25. Mean magnitudes range from 5 to 4. Directions are orthogonalised for 100 steps.
    """

    def __init__(self, config: SaeLensConfig) -> None:
        if importlib.util.find_spec("sae_lens") is None:
            raise UserError(
                "sae-lens must be installed; it was not found. Install it with: pip install sae-lens, or use source "
                "'own'."
            )
        from sae_lens.synthetic import (
            FeatureDictionary,
            FoldedNormalMagnitudeConfig,
            HierarchyConfig,
            LinearMagnitudeConfig,
            LowRankCorrelationConfig,
            SyntheticModel,
            SyntheticModelConfig,
            ZipfianFiringProbabilityConfig,
            orthogonal_initializer,
        )

        self.config = config
        # hashed, because an SAE initialised with the same seed would draw the directions it has to recover
        seed = _seed(config.seed)
        directions = FeatureDictionary(  # created here, because the model would show a progress bar
            num_features=config.features,
            hidden_dim=config.d_in,
            initializer=orthogonal_initializer(num_steps=100, lr=3e-4),
            seed=seed,
        )
        self.model = SyntheticModel(
            SyntheticModelConfig(
                num_features=config.features,
                hidden_dim=config.d_in,
                firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
                hierarchy=HierarchyConfig(
                    total_root_nodes=config.features // 128,
                    branching_factor=4,
                    max_depth=3,
                    mutually_exclusive_portion=1.0,
                    compensate_probabilities=True,
                ),
                correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
                mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
                std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
                bias=False,
                seed=seed,
            ),
            feature_dict=directions,
        )
        self.directions_GD: Tensor = torch.nn.functional.normalize(directions.feature_vectors.detach(), dim=1)
        roots, edges = [], []
        waiting = list(self.model.hierarchy.roots) if self.model.hierarchy is not None else []
        for node in waiting:
            roots.append(node.feature_index)
        while waiting:
            node = waiting.pop()
            edges += [(node.feature_index, child.feature_index) for child in node.children]
            waiting += node.children
        children = sorted(child for _, child in edges)
        free = sorted(set(range(config.features)) - set(roots) - set(children))
        kinds = {"independent": free, "root": sorted(roots), "child": children}
        self.kinds = {kind: torch.tensor(numbers) for kind, numbers in kinds.items() if numbers}
        self.edges = {"hierarchy": torch.tensor(sorted(edges), dtype=torch.int64).reshape(-1, 2)}

    def sample(self, tokens: int, *, held_out: bool, number: int) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B G"]]:
        """Return batch ``number`` of the training or held-out tokens: x, and the feature activations that compose it.

        sae-lens draws from torch's global generator. It is seeded for each batch, and its state is restored.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.config.seed, 1 + held_out, number))
            x_BD, activations_BG = self.model.sample_with_features(tokens)
        return x_BD, activations_BG


def _seed(*words: int) -> int:
    """Return a seed below 2^31 that depends on all ``words``."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1
