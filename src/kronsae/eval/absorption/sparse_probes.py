"""Which latents stand for a class: k-sparse probes, and the number k at which they stop getting better."""

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
        latents: those of the largest weights, the largest first.
        f1_by_k: F1 on held-out examples of a logistic regression on the first k of them, k = 1, 2, ...
        split: how many of them stand for the class, see `num_split`.
    """

    latents: tuple[int, ...]
    f1_by_k: tuple[float, ...]
    split: int

    @property
    def main(self) -> tuple[int, ...]:
        """The latents that stand for the class."""
        return self.latents[: self.split]


def num_split(f1_by_k: Sequence[float], jump: float) -> int:
    """The largest k up to which every further latent raised F1 by more than ``jump``; 1 if the second did not."""
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
    """The latents of one class and how well the first k of them tell it.

    Args:
        weight_F: the class's weights in an L1 probe on the latents; the largest, signed, are taken.
        train, train_true_E: codes and whether they have the class, to fit the regressions to.
        held_out, held_out_true_E: the same, to score them on.
        max_k: how many latents at most.
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
    """Weights and bias of scikit-learn's ``LogisticRegression(max_iter=500, class_weight="balanced")``, float32."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if bool(true_E.all()) or not bool(true_E.any()):
        return torch.zeros(x_EK.shape[1]), -1.0  # nothing to tell apart: never there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps are the definition, converged or not
        fitted = LogisticRegression(max_iter=500, class_weight="balanced").fit(
            x_EK.float().numpy(), true_E.to(torch.int64).numpy()
        )
    return torch.tensor(fitted.coef_[0]).float(), float(torch.tensor(fitted.intercept_[0]).float())
