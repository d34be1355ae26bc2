"""Targeted perturbation: ablate a concept's latents and measure the change in the accuracy of all probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.eval.absorption.probes import LinearProbe
from kronsae.eval.example_codes import columns


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Effect on the probes of ablating the most important latents of each concept.

    Args:
        latents: number of ablated latents.
        own: decrease in accuracy of the concept's own probe, mean over concepts.
        others: decrease in accuracy of the other concepts' probes, mean over pairs of concepts.
        score: ``own - others``; large if the latents are specific to the concept.
    """

    latents: int
    own: float
    others: float

    @property
    def score(self) -> float:
        """``own - others``."""
        return self.own - self.others


def important_latents(
    difference_FL: np.ndarray, W_dec_FD: Float[Tensor, "F D"], probe: LinearProbe
) -> Float[Tensor, "F L"]:
    """Return each latent's contribution to a probe's contrast: ``(mean activation with - without) * W_dec_i . w``."""
    along_FL = W_dec_FD @ probe.weight_CI.to(W_dec_FD).T
    return torch.from_numpy(difference_FL).to(along_FL) * along_FL


def perturbations(
    codes: SparseCodes,
    logits_NL: Float[Tensor, "N L"],
    labels_NL: Tensor,
    samples: Sequence[Tensor],
    importance_FL: Float[Tensor, "F L"],
    along_FL: Float[Tensor, "F L"],
    sizes: Sequence[int],
) -> tuple[Perturbation, ...]:
    """Ablate each concept's latents in turn (keeping the error term) and score each probe on its balanced sample.

    Without the latents S the activation is ``x - sum_{i in S} f_i W_dec_i``, so a probe's logit changes by
    ``- sum_{i in S} f_i W_dec_i . w``. Activations need not be recomputed.

    Args:
        codes: codes of the sampled tokens.
        logits_NL: logits of the probes on the original activations.
        labels_NL: concepts of the tokens.
        samples: for each concept, the rows it is scored on; equal numbers with and without the concept.
        importance_FL: `important_latents`; those with the largest values are ablated.
        along_FL: ``W_dec_i . w`` of each latent and probe.
        sizes: numbers of latents to ablate.
    """
    concepts = labels_NL.shape[1]
    before_L = _accuracies(logits_NL, labels_NL, samples)
    found = []
    for size in sizes:
        drop_LL = torch.zeros(concepts, concepts, dtype=torch.float64)
        for concept in range(concepts):
            chosen = importance_FL[:, concept].topk(min(size, len(importance_FL))).indices
            gone_NL = columns(codes, chosen.tolist()) @ along_FL[chosen].float()
            drop_LL[concept] = before_L - _accuracies(logits_NL - gone_NL, labels_NL, samples)
        own = float(drop_LL.diagonal().mean())
        others = float((drop_LL.sum() - drop_LL.diagonal().sum()) / max(1, concepts * (concepts - 1)))
        found.append(Perturbation(latents=size, own=own, others=others))
    return tuple(found)


def _accuracies(logits_NL: Tensor, labels_NL: Tensor, samples: Sequence[Tensor]) -> Float[Tensor, " L"]:
    right_NL = (logits_NL > 0) == labels_NL
    return torch.stack([right_NL[rows, concept].double().mean() for concept, rows in enumerate(samples)])


def balanced_samples(labels_NL: Tensor, among_N: Tensor, each: int, rng: np.random.Generator) -> list[Tensor]:
    """Draw rows for each concept among the tokens ``among_N``: equal numbers with and without, at most ``each``."""
    found = []
    for concept in range(labels_NL.shape[1]):
        has_N = labels_NL[:, concept]
        sides = [(among_N & side).nonzero().squeeze(1).numpy() for side in (has_N, ~has_N)]
        size = min(each, *map(len, sides))
        rows = np.concatenate([rng.choice(side, size, replace=False) for side in sides])
        found.append(torch.from_numpy(np.sort(rows)))
    return found
