"""Selection of the latents that represent a class: k-sparse probes, and the k at which F1 stops improving."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.eval.absorption.probes import f1
from kronsae.eval.example_codes import columns


@dataclass(frozen=True, kw_only=True)
class SparseProbes:
    """The k-sparse probes of one class.

    Args:
        latents: latents with the largest weights, largest first.
        f1_by_k: F1 on held-out examples of a logistic regression on the first k latents, k = 1, 2, ...
        split: how many of the latents represent the class, see `num_split`.
    """

    latents: tuple[int, ...]
    f1_by_k: tuple[float, ...]
    split: int

    @property
    def main(self) -> tuple[int, ...]:
        """The latents that represent the class."""
        return self.latents[: self.split]


def num_split(f1_by_k: Sequence[float], jump: float) -> int:
    """Return the largest k such that each latent after the first raised F1 by more than ``jump``; at least 1."""
    k = 1
    while k < len(f1_by_k) and f1_by_k[k] > f1_by_k[k - 1] + jump:
        k += 1
    return k


def sparse_probes(
    weight_F: Float[Tensor, " F"],
    train: SparseCodes,
    train_true_E: Tensor,
    held_out: SparseCodes,
    held_out_true_E: Tensor,
    *,
    max_k: int,
    jump: float,
) -> SparseProbes:
    """Select the latents of one class and fit the k-sparse probes on them.

    Args:
        weight_F: the class's weights in an L1 probe on the latents; the largest (signed) are selected.
        train, train_true_E: codes and labels to fit the regressions on.
        held_out, held_out_true_E: codes and labels to score them on.
        max_k: maximum number of latents.
        jump: see `num_split`.
    """
    chosen = weight_F.topk(min(max_k, len(weight_F))).indices.tolist()
    train_EC, held_out_EC = columns(train, chosen), columns(held_out, chosen)
    scores = []
    for k in range(1, len(chosen) + 1):
        weight_K, bias = logistic_regression(train_EC[:, :k], train_true_E)
        scores.append(f1(held_out_EC[:, :k] @ weight_K + bias > 0, held_out_true_E))
    return SparseProbes(latents=tuple(chosen), f1_by_k=tuple(scores), split=num_split(scores, jump))


def logistic_regression(x_EK: Float[Tensor, "E K"], true_E: Int[Tensor, " E"]) -> tuple[Tensor, float]:
    """Fit scikit-learn's ``LogisticRegression(max_iter=500, class_weight="balanced")``; return weights and bias."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if bool(true_E.all()) or not bool(true_E.any()):
        return torch.zeros(x_EK.shape[1]), -1.0  # a single class: always predict "absent"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # SAEBench's definition: 500 steps, converged or not
        fitted = LogisticRegression(max_iter=500, class_weight="balanced").fit(
            x_EK.float().numpy(), true_E.to(torch.int64).numpy()
        )
    return torch.tensor(fitted.coef_[0]).float(), float(torch.tensor(fitted.intercept_[0]).float())
