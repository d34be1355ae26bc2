"""Metrics of how well a dictionary recovers a known covariance, for the toy model of correlation.

A dictionary's estimate of the feature correlations is the Gram matrix of its rows, scaled to norm 1. Before the
comparison, its rows are permuted into the order of the true features. The order is found by matching to a reference
dictionary whose rows are in that order: the toy model's autoencoder. Method: section 5.1 and appendix B of arXiv
2505.22255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.support.errors import UserError


def gram(rows_FD: Float[Tensor, "F D"]) -> Float[Tensor, "F F"]:
    """Return ``R R^T`` with the rows of R scaled to norm 1, in float64; rows of zeros stay zero."""
    rows_FD = torch.nn.functional.normalize(rows_FD.detach().double(), dim=1)
    return rows_FD @ rows_FD.T


def rv_coefficient(one_FF: Float[Tensor, "F F"], other_FF: Float[Tensor, "F F"]) -> float:
    """Return ``tr(S C) / sqrt(tr(S^2) tr(C^2))`` of two symmetric matrices (Robert and Escoufier 1976).

    It is 1 if one matrix is a positive multiple of the other. For two covariances it is never negative, and their
    positive diagonals alone make it larger than 0. Compare it with its chance level, `permuted_rv`.
    """
    if one_FF.shape != other_FF.shape:
        raise UserError(f"the matrices must have equal shapes; got {tuple(one_FF.shape)} and {tuple(other_FF.shape)}.")
    one_FF, other_FF = one_FF.double(), other_FF.double()
    return float((one_FF * other_FF).sum() / (one_FF.norm() * other_FF.norm()))


def permuted_rv(truth_FF: Float[Tensor, "F F"], found_FF: Float[Tensor, "F F"]) -> float:
    """Return the mean of `rv_coefficient` over all permutations of the true features: its chance level.

    ``E tr(P S P^T C) = sum_i S_ii sum_i C_ii / F + sum_(i != j) S_ij sum_(i != j) C_ij / (F (F - 1))``.
    """
    truth_FF, found_FF = truth_FF.double(), found_FF.double()
    size = len(truth_FF)
    traces = truth_FF.trace() * found_FF.trace() / size
    rests = (truth_FF.sum() - truth_FF.trace()) * (found_FF.sum() - found_FF.trace()) / max(1, size * (size - 1))
    return float((traces + rests) / (truth_FF.norm() * found_FF.norm()))


def effective_rank(covariance_FF: Float[Tensor, "F F"]) -> float:
    """Return ``exp(-sum p ln p)``, p being the eigenvalues divided by their sum (Roy and Vetterli 2007); 1 to F."""
    share_F = torch.linalg.eigvalsh(covariance_FF.double()).clamp_min(0)
    share_F = share_F / share_F.sum()
    return float((-torch.special.xlogy(share_F, share_F)).sum().exp())


def mean_correlation(covariance_FF: Float[Tensor, "F F"]) -> float:
    """Return the mean of ``|C_ij| / sqrt(C_ii C_jj)`` over ``i != j``; 0 for pairs with a feature of variance 0."""
    root_F = covariance_FF.double().diagonal().clamp_min(0).sqrt()
    scale_FF = root_F.unsqueeze(1) * root_F
    correlation_FF = torch.where(scale_FF > 0, covariance_FF.double() / scale_FF, 0.0)
    correlation_FF.fill_diagonal_(0.0)
    size = len(root_F)
    return float(correlation_FF.abs().sum() / max(1, size * (size - 1)))


def match_by_structure(reference_FD: Float[Tensor, "F D"], rows_FD: Float[Tensor, "F D"]) -> Int[Tensor, " F"]:
    """Return the order of ``rows`` whose Gram matrix is most similar to the reference's (the paper's matching).

    Maximises ``trace(P^T X X^T P Y Y^T)`` over permutations by FAQ (Vogelstein et al. 2015), a local search that starts
    from the uniform doubly stochastic matrix. It uses only the two Gram matrices, not the directions. ``rows[order]``
    is matched to the reference.
    """
    from scipy.optimize import quadratic_assignment

    _check_equal(reference_FD, rows_FD)
    pictures = gram(reference_FD).numpy(), gram(rows_FD).numpy()
    options = {"maximize": True, "rng": np.random.default_rng(0)}  # the uniform start draws nothing
    return torch.from_numpy(np.asarray(quadratic_assignment(*pictures, method="faq", options=options).col_ind))


def match_by_direction(reference_FD: Float[Tensor, "F D"], rows_FD: Float[Tensor, "F D"]) -> Int[Tensor, " F"]:
    """Return the order of ``rows`` with the largest sum of cosines with the reference's rows (ours; exact, Hungarian).

    Both dictionaries are in the same space, so their directions can be matched. ``rows[order]`` is matched to the
    reference.
    """
    from scipy.optimize import linear_sum_assignment

    _check_equal(reference_FD, rows_FD)
    return torch.from_numpy(
        np.asarray(linear_sum_assignment(_cosines(reference_FD, rows_FD).numpy(), maximize=True)[1])
    )


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Comparison of one dictionary's Gram matrix with the true covariance.

    Args:
        rv: `rv_coefficient` after `match_by_structure` (the paper's figure).
        rv_by_direction: `rv_coefficient` after `match_by_direction`.
        rv_permuted: `permuted_rv`, the chance level.
        effective_rank: `effective_rank` of the Gram matrix.
        rank_difference: absolute difference between `effective_rank` and that of the truth.
        mean_correlation: `mean_correlation` of the Gram matrix.
        mean_cosine: mean over rows of the cosine with the matched reference row, after `match_by_direction`.
    """

    rv: float
    rv_by_direction: float
    rv_permuted: float
    effective_rank: float
    rank_difference: float
    mean_correlation: float
    mean_cosine: float


def recovery(
    rows_FD: Float[Tensor, "F D"],
    reference_FD: Float[Tensor, "F D"],
    truth_FF: Float[Tensor, "F F"],
    *,
    in_order: bool = False,
) -> Recovery:
    """Match a dictionary to the reference and compare its Gram matrix with the true covariance.

    Args:
        rows_FD: the dictionary, such as ``W_dec``.
        reference_FD: a dictionary whose rows are in the order of the true features.
        truth_FF: the true covariance.
        in_order: whether the rows are already in the order of the true features, as the reference's are. If so,
            nothing is matched.
    """
    own = torch.arange(len(rows_FD))
    structure_F = own if in_order else match_by_structure(reference_FD, rows_FD)
    direction_F = own if in_order else match_by_direction(reference_FD, rows_FD)
    picture_FF = gram(rows_FD)
    rank = effective_rank(picture_FF)
    return Recovery(
        rv=rv_coefficient(truth_FF, picture_FF[structure_F][:, structure_F]),
        rv_by_direction=rv_coefficient(truth_FF, picture_FF[direction_F][:, direction_F]),
        rv_permuted=permuted_rv(truth_FF, picture_FF),
        effective_rank=rank,
        rank_difference=abs(rank - effective_rank(truth_FF)),
        mean_correlation=mean_correlation(picture_FF),
        mean_cosine=float(_cosines(reference_FD, rows_FD[direction_F]).diagonal().mean()),
    )


def _cosines(one_FD: Tensor, other_FD: Tensor) -> Tensor:
    one_FD, other_FD = (torch.nn.functional.normalize(rows.detach().double(), dim=1) for rows in (one_FD, other_FD))
    return one_FD @ other_FD.T


def _check_equal(reference_FD: Tensor, rows_FD: Tensor) -> None:
    if reference_FD.shape != rows_FD.shape:
        raise UserError(
            f"the dictionary must have the reference's shape {tuple(reference_FD.shape)}; got {tuple(rows_FD.shape)}. "
            "Give both the same number of latents and the same width."
        )
