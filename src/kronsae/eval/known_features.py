"""Metrics of how well an SAE recovers known features: directions, detection, absorption.

``directions_GD`` are the true features' directions, ``activations_BG`` their activations on a batch. Metrics that
sae-lens also has (`sae_lens.synthetic`) give the same values here; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kronsae.core.codes import SparseCodes

NO_LATENT = -1
"""Index that marks a feature without a matched latent."""


def absolute_cosines(W_dec_FD: Float[Tensor, "F D"], directions_GD: Float[Tensor, "G D"]) -> Float[Tensor, "F G"]:
    """Return ``|cos|`` between each latent's row and each feature's direction; 0 for rows of zeros."""
    rows_FD, rows_GD = (
        torch.nn.functional.normalize(rows.detach().float(), dim=1) for rows in (W_dec_FD, directions_GD)
    )
    return (rows_FD @ rows_GD.T).abs()


def match_features(cosine_FG: Float[Tensor, "F G"]) -> Int[Tensor, " G"]:
    """Return each feature's own latent: the one-to-one matching with the largest sum of cosines (Hungarian).

    With fewer latents than features, the features left over have `NO_LATENT`.
    """
    from scipy.optimize import linear_sum_assignment

    latents, features = linear_sum_assignment(cosine_FG.numpy(), maximize=True)
    latent_G = torch.full((cosine_FG.shape[1],), NO_LATENT)
    latent_G[torch.from_numpy(np.asarray(features))] = torch.from_numpy(np.asarray(latents))
    return latent_G


def mean_correlation_coefficient(cosine_FG: Float[Tensor, "F G"]) -> float:
    """Return the MCC: mean ``|cos|`` over the min(F, G) pairs of `match_features` (arXiv 2505.20254)."""
    latent_G = match_features(cosine_FG)
    return float(_own_cosines(cosine_FG, latent_G)[latent_G != NO_LATENT].mean())


def uniqueness(cosine_FG: Float[Tensor, "F G"]) -> float:
    """Return the number of distinct nearest features divided by the number of latents; 1 if all are distinct."""
    return len(cosine_FG.argmax(1).unique()) / len(cosine_FG)


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Absorption: a parent feature's latent is inactive where a child feature's latent is active.

    Args:
        rate: share of tokens on which the parent's latent is inactive, among tokens where the parent is active and the
            latent of an active child is active; mean over parents.
        missed_alone: share of tokens on which the parent's latent is inactive, among tokens where the parent is active
            and no child is; mean over parents. This is the miss rate without a child: only a ``rate`` above it
            indicates absorption.
        parents: number of parents that ``rate`` is averaged over.
    """

    rate: float | None
    missed_alone: float | None
    parents: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """Recovery of the known features by an SAE. Latents and features are matched by decoder directions only.

    Args:
        mcc: `mean_correlation_coefficient`.
        uniqueness: `uniqueness`.
        precision, recall, f1: scores of each latent as a detector of its nearest feature, mean over latents; 0 where
            undefined, as for a dead latent. Defined as in sae-lens.
        cosine_by_kind: mean ``|cos|`` of each feature with its own latent (one to one), by kind of feature.
        f1_by_kind: mean F1 of each feature's own latent as a detector of the feature, by kind of feature.
        absorption: absorption by kind of relation.
    """

    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    cosine_by_kind: dict[str, float]
    f1_by_kind: dict[str, float]
    absorption: dict[str, Absorption]


class KnownFeaturesMeter:
    """Accumulator of `Found` over batches. Memory is B x G (true features), not B x F (latents).

    Args:
        W_dec_FD: the SAE's dictionary.
        directions_GD: the true directions.
        kinds: feature indices by kind of feature.
        edges: pairs (parent, child) by kind of relation.
    """

    def __init__(
        self,
        W_dec_FD: Float[Tensor, "F D"],
        directions_GD: Float[Tensor, "G D"],
        kinds: Mapping[str, Int[Tensor, " C"]],
        edges: Mapping[str, Int[Tensor, "E 2"]],
    ) -> None:
        self.cosine_FG = absolute_cosines(W_dec_FD, directions_GD)
        self.nearest_F = self.cosine_FG.argmax(1)
        self.latent_G = match_features(self.cosine_FG)
        self.kinds = {kind: features for kind, features in kinds.items() if len(features)}  # skip empty kinds
        self.edges = edges
        d_sae, features = self.cosine_FG.shape
        self.feature_F = torch.full((d_sae,), features)  # an extra last column means "no feature"
        has_G = self.latent_G != NO_LATENT
        self.feature_F[self.latent_G[has_G]] = has_G.nonzero().squeeze(1)
        self._on_G, self._hits_G, self._fired_G = (torch.zeros(features, dtype=torch.int64) for _ in range(3))
        self._fired_F, self._hits_F = (torch.zeros(d_sae, dtype=torch.int64) for _ in range(2))
        self._absorption = {kind: torch.zeros(4, features, dtype=torch.int64) for kind in edges}

    def update(self, codes: SparseCodes, activations_BG: Float[Tensor, "B G"]) -> None:
        """Add one batch: the SAE's codes and the true activations."""
        on_BG = activations_BG > 0
        indices_BK, active_BK = codes.indices, codes.active
        self._on_G += on_BG.sum(0)
        self._fired_F += codes.counts()
        hits_BK = on_BG.gather(1, self.nearest_F[indices_BK]) & active_BK
        self._hits_F += torch.bincount(indices_BK[hits_BK], minlength=codes.d_sae)
        detected_BG = self._detected(indices_BK, active_BK, on_BG.shape[1])
        self._fired_G += detected_BG.sum(0)
        self._hits_G += (detected_BG & on_BG).sum(0)
        for kind, edges_E2 in self.edges.items():
            self._absorption[kind] += absorption_counts(on_BG, detected_BG, edges_E2)

    def _detected(self, indices_BK: Tensor, active_BK: Tensor, features: int) -> Bool[Tensor, "B G"]:
        """Return whether each feature's own latent is active."""
        columns_BK = torch.where(active_BK, self.feature_F[indices_BK], features)
        table_BG = torch.zeros(len(columns_BK), features + 1, dtype=torch.bool)
        return table_BG.scatter_(1, columns_BK, True)[:, :features]

    def value(self) -> Found:
        """Return the metrics over the batches added."""
        on_F = self._on_G[self.nearest_F]
        precision_F, recall_F = _ratio(self._hits_F, self._fired_F), _ratio(self._hits_F, on_F)
        f1_G = _ratio(2 * self._hits_G, self._fired_G + self._on_G)
        own_G = _own_cosines(self.cosine_FG, self.latent_G)
        return Found(
            mcc=float(own_G[self.latent_G != NO_LATENT].mean()),
            uniqueness=uniqueness(self.cosine_FG),
            precision=float(precision_F.mean()),
            recall=float(recall_F.mean()),
            f1=float(_ratio(2 * self._hits_F, self._fired_F + on_F).mean()),
            cosine_by_kind={kind: float(own_G[features].mean()) for kind, features in self.kinds.items()},
            f1_by_kind={kind: float(f1_G[features].mean()) for kind, features in self.kinds.items()},
            absorption={kind: _absorption(counts) for kind, counts in self._absorption.items()},
        )


def absorption_counts(
    on_BG: Bool[Tensor, "B G"], detected_BG: Bool[Tensor, "B G"], edges_E2: Int[Tensor, "E 2"]
) -> Int[Tensor, "4 G"]:
    """Count tokens for each feature as a parent, for `Absorption`.

    Returns:
        Four rows of counts over tokens on which the parent is active: (0) the latent of an active child is active;
        (1) of these, the parent's latent is inactive; (2) no child is active; (3) of these, the parent's latent is
        inactive.

    Args:
        on_BG: which features are active.
        detected_BG: which features' own latents are active.
        edges_E2: pairs (parent, child).
    """
    parent_E, child_E = edges_E2[:, 0], edges_E2[:, 1]
    is_parent_G = torch.zeros(on_BG.shape[1], dtype=torch.bool)
    is_parent_G[parent_E] = True

    def any_child(flag_BG: Tensor) -> Tensor:
        count_BG = torch.zeros(flag_BG.shape, dtype=torch.int32)
        return count_BG.index_add_(1, parent_E, flag_BG[:, child_E].int()) > 0

    parent_on_BG = on_BG & is_parent_G
    alone_BG = parent_on_BG & ~any_child(on_BG)
    child_fires_BG = parent_on_BG & any_child(on_BG & detected_BG)
    tables = child_fires_BG, child_fires_BG & ~detected_BG, alone_BG, alone_BG & ~detected_BG
    return torch.stack([table_BG.sum(0) for table_BG in tables])


def _own_cosines(cosine_FG: Tensor, latent_G: Tensor) -> Tensor:
    """Return the cosine of each feature with its own latent, in float64; 0 for a feature without a latent."""
    own_G = cosine_FG[latent_G, torch.arange(len(latent_G))]
    return torch.where(latent_G != NO_LATENT, own_G, 0.0).double()


def _absorption(counts_4G: Tensor) -> Absorption:
    child_fires_G, absorbed_G, alone_G, missed_G = counts_4G.double()
    seen_G, seen_alone_G = child_fires_G > 0, alone_G > 0
    return Absorption(
        rate=float((absorbed_G / child_fires_G)[seen_G].mean()) if seen_G.any() else None,
        missed_alone=float((missed_G / alone_G)[seen_alone_G].mean()) if seen_alone_G.any() else None,
        parents=int(seen_G.sum()),
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return ``part / whole`` in float64, 0 where ``whole`` is 0."""
    return torch.where(whole > 0, part.double() / whole.double(), 0.0)
