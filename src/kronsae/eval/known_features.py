"""How much of what is known to be there an SAE finds: directions, detection, absorption.

``directions_GD`` are the true features' directions, ``activations_BG`` their activations on a batch. Where sae-lens
measures the same (`sae_lens.synthetic`), the figure here is the same; a test compares them.
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
"""In place of a latent's number: the feature has none."""


def absolute_cosines(W_dec_FD: Float[Tensor, "F D"], directions_GD: Float[Tensor, "G D"]) -> Float[Tensor, "F G"]:
    """``|cos|`` of every latent's row with every feature's direction; a row of zeros has 0 with all."""
    rows_FD, rows_GD = (
        torch.nn.functional.normalize(rows.detach().float(), dim=1) for rows in (W_dec_FD, directions_GD)
    )
    return (rows_FD @ rows_GD.T).abs()


def match_features(cosine_FG: Float[Tensor, "F G"]) -> Int[Tensor, " G"]:
    """For each feature the latent that stands for it, one to one, so that the sum of cosines is largest (Hungarian).

    `NO_LATENT` where there are fewer latents than features.
    """
    from scipy.optimize import linear_sum_assignment

    latents, features = linear_sum_assignment(cosine_FG.numpy(), maximize=True)
    latent_G = torch.full((cosine_FG.shape[1],), NO_LATENT)
    latent_G[torch.from_numpy(np.asarray(features))] = torch.from_numpy(np.asarray(latents))
    return latent_G


def mean_correlation_coefficient(cosine_FG: Float[Tensor, "F G"]) -> float:
    """MCC: mean ``|cos|`` over the pairs of `match_features`, of which there are min(F, G) (arXiv 2505.20254)."""
    latent_G = match_features(cosine_FG)
    return float(_own_cosines(cosine_FG, latent_G)[latent_G != NO_LATENT].mean())


def uniqueness(cosine_FG: Float[Tensor, "F G"]) -> float:
    """Different features among the latents' nearest ones, over the number of latents; 1: no two share one."""
    return len(cosine_FG.argmax(1).unique()) / len(cosine_FG)


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Parents whose latent stays off because a child's stands in for it.

    Args:
        rate: of the tokens on which a parent is on and an active child's latent fires, the share on which the parent's
            latent is off; mean over parents.
        missed_alone: of the tokens on which the parent is on and no child of it, the share on which its latent is off;
            mean over parents. What a parent misses without any child: only a rate above it is absorption.
        parents: over how many the rate is taken.
    """

    rate: float | None
    missed_alone: float | None
    parents: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an SAE found of the known features. Latents and features are matched by the decoder's directions alone.

    Args:
        mcc: `mean_correlation_coefficient`.
        uniqueness: `uniqueness`.
        precision, recall, f1: of each latent as a detector of its nearest feature, mean over latents (0 where
            undefined, as for a dead latent): sae-lens' figures.
        cosine_by_kind: mean ``|cos|`` of each feature with its own latent (one to one), by kind of feature.
        f1_by_kind: mean F1 of each feature's own latent as its detector, by kind of feature.
        absorption: by kind of relation.
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
    """Accumulates `Found` over batches; memory is of B x G, the true features, never of B x F.

    Args:
        W_dec_FD: the SAE's dictionary.
        directions_GD: the true directions.
        kinds: numbers of the features of each kind.
        edges: by kind of relation, pairs (parent, child).
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
        self.kinds = {kind: features for kind, features in kinds.items() if len(features)}  # no mean of nothing
        self.edges = edges
        d_sae, features = self.cosine_FG.shape
        self.feature_F = torch.full((d_sae,), features)  # the last column of a table stands for "no feature"
        has_G = self.latent_G != NO_LATENT
        self.feature_F[self.latent_G[has_G]] = has_G.nonzero().squeeze(1)
        self._on_G, self._hits_G, self._fired_G = (torch.zeros(features, dtype=torch.int64) for _ in range(3))
        self._fired_F, self._hits_F = (torch.zeros(d_sae, dtype=torch.int64) for _ in range(2))
        self._absorption = {kind: torch.zeros(4, features, dtype=torch.int64) for kind in edges}

    def update(self, codes: SparseCodes, activations_BG: Float[Tensor, "B G"]) -> None:
        """Take in one batch: the SAE's codes and the true activations."""
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
        """Whether each feature's own latent is on."""
        columns_BK = torch.where(active_BK, self.feature_F[indices_BK], features)
        table_BG = torch.zeros(len(columns_BK), features + 1, dtype=torch.bool)
        return table_BG.scatter_(1, columns_BK, True)[:, :features]

    def value(self) -> Found:
        """The figures of the batches taken in."""
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
    """Per feature, as a parent, numbers of tokens: with a child whose latent fires, and of these absorbed; without any
    child, and of these missed.

    Args:
        on_BG: which features are on.
        detected_BG: which features' own latents are on.
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
    """The cosine of each feature with its own latent, float64; 0 for a feature without one."""
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
    """``part / whole`` as float64, 0 where whole is 0."""
    return torch.where(whole > 0, part.double() / whole.double(), 0.0)
