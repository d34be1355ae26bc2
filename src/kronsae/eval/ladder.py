"""The ladder: what the same dictionary explains at the same k, from the encoder's own codes to matching pursuit.

Each rung frees one more thing from the encoder, so the steps between them say what limits an SAE: the *values* on its
own support, the *ranking* of its candidates, their *recall* (a good latent that is no candidate), or the *dictionary*.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.metrics import ExplainedVariance
from kronsae.core.pursuit import Pursuit
from kronsae.core.sae import SAE
from kronsae.kernels import Choice

CHUNK_ELEMENTS = 2**24
SWEEPS = 100
"""At most, of coordinate descent; unit rows of usual dictionaries need a few dozen to settle to `SETTLED`."""
SETTLED = 1e-4
"""Largest change of a value in a sweep, as a share of the token's largest value, at which it has settled."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Explained variances of one SAE, all on the same tokens with at most k active latents, values never negative.

    Args:
        tokens: tokens measured.
        k: latents per token.
        encoded: the encoder's own codes.
        one_step: its support; one conjugate gradient step on all values, ``Pursuit(rounds=1, refit=1)``.
        best_values: its support; the values of least squared error.
        pursuit: `Pursuit()`, two rounds among the encoder's 2k best.
        among_2k, among_4k: orthogonal matching pursuit among the encoder's 2k and 4k best, or all where a token has
            fewer.
        among_all: the same among all latents.
    """

    tokens: int
    k: int
    encoded: float
    one_step: float
    best_values: float
    pursuit: float
    among_2k: float
    among_4k: float
    among_all: float

    @property
    def lost_by(self) -> dict[str, float]:
        """What explained variance is lost by, from 1 down to `encoded`; the four parts sum to ``1 - encoded``."""
        return {
            "values": self.best_values - self.encoded,
            "ranking": self.among_4k - self.best_values,
            "recall": self.among_all - self.among_4k,
            "dictionary": 1 - self.among_all,
        }


@torch.no_grad()
def ladder(sae: SAE, batches: Iterable[Float[Tensor, "B D"]]) -> Ladder:
    """Climb the ladder on some activations.

    The best values are found by cyclic coordinate descent, which ends where no value changes by more than `SETTLED`;
    matching pursuit adds the candidate of largest ``<u_f, e>`` (u_f the unit row), positive only, and finds the best
    non-negative values anew each time, as non-negative orthogonal matching pursuit does (Bruckstein et al. 2008).

    Args:
        sae: an SAE for which a pursuit is defined: TopK, one hook.
        batches: tensors ``[B, d_in]``; read once.

    Raises:
        UserError: a pursuit is not defined for it.
    """
    k, most = sae.sparsifier.config.k, sae.encoder.config.latents_per_token
    pursuit = Pursuit(rounds=min(2, k), candidates=max(1, min(2, most // k)))
    meters = {name: ExplainedVariance() for name in Ladder.__dataclass_fields__ if name not in ("tokens", "k")}
    for batch_BD in batches:
        chunk = max(1, CHUNK_ELEMENTS // max(sae.d_sae, k * sae.d_in))
        for x_BD in batch_BD.to(sae.W_dec).split(chunk):
            own = sae.encode(x_BD, Pursuit(rounds=1, refit=0))
            best = best_values(x_BD - sae.b_dec, sae.W_dec, own.indices, own.active)
            codes = {
                "encoded": own,
                "one_step": sae.encode(x_BD, Pursuit(rounds=1, refit=1)),
                "best_values": SparseCodes(best, own.indices, sae.d_sae),
                "pursuit": sae.encode(x_BD, pursuit),
                "among_all": matching_pursuit(sae, x_BD, k),
            }
            latents = sae.encoder(x_BD)
            for name, times in (("among_2k", 2), ("among_4k", 4)):
                candidates = latents.choose(Choice(min(times * k, most)))[0]
                codes[name] = matching_pursuit(sae, x_BD, k, candidates)
            for name, meter in meters.items():
                meter.update(x_BD, sae.decode(codes[name]))
    return Ladder(tokens=meters["encoded"].tokens, k=k, **{name: meter.value() for name, meter in meters.items()})


def matching_pursuit(
    sae: SAE, x_BD: Float[Tensor, "B D"], k: int, candidates: SparseCodes | None = None
) -> SparseCodes:
    """Non-negative orthogonal matching pursuit with k latents a token; those of value 0 are no candidates.

    Args:
        sae: whose dictionary.
        x_BD: what is reconstructed.
        k: latents a token.
        candidates: among which; None: all latents, for which B x F products are held.
    """
    target_BD = x_BD - sae.b_dec
    tokens, inverse_F = len(x_BD), kernels.inverse_norms(sae.W_dec)
    if candidates is None:
        allowed = torch.ones(tokens, sae.d_sae, dtype=torch.bool, device=x_BD.device)
    else:
        allowed = candidates.active.clone()
    chosen_BK = torch.zeros(tokens, k, dtype=torch.int64, device=x_BD.device)
    active_BK = torch.zeros(tokens, k, dtype=torch.bool, device=x_BD.device)
    values_BK = target_BD.new_zeros(tokens, k)
    residual_BD = target_BD
    for n in range(k):
        if candidates is None:
            fit = residual_BD @ sae.W_dec.T * inverse_F
        else:
            fit = kernels.sampled_products(residual_BD, sae.W_dec, candidates.indices) * inverse_F[candidates.indices]
        best_B1 = torch.where(allowed, fit, 0.0).argmax(1, keepdim=True)
        chosen_BK[:, n] = (best_B1 if candidates is None else candidates.indices.gather(1, best_B1)).squeeze(1)
        active_BK[:, n] = (allowed.gather(1, best_B1) & (fit.gather(1, best_B1) > 0)).squeeze(1)
        allowed.scatter_(1, best_B1, False)
        now = slice(0, n + 1)
        start_BK = values_BK[:, now]
        values_BK[:, now] = best_values(target_BD, sae.W_dec, chosen_BK[:, now], active_BK[:, now], start_BK)
        residual_BD = target_BD - kernels.decode(
            values_BK[:, now], chosen_BK[:, now], sae.W_dec, torch.zeros_like(sae.b_dec)
        )
    return SparseCodes(values_BK, chosen_BK, sae.d_sae)


def best_values(
    target_BD: Float[Tensor, "B D"],
    W_dec_FD: Float[Tensor, "F D"],
    indices_BK: Int[Tensor, "B K"],
    active_BK: Tensor,
    start_BK: Tensor | None = None,
) -> Float[Tensor, "B K"]:
    """``argmin |target - sum_k z_k W_dec[k]|^2`` over ``z >= 0``, with z = 0 where not active.

    Cyclic coordinate descent: each value in turn becomes the best one given the others, from ``start_BK`` or 0.
    """
    rows_BKD = W_dec_FD[indices_BK]
    gram_BKK = rows_BKD @ rows_BKD.transpose(1, 2)
    products_BK = torch.einsum("bkd,bd->bk", rows_BKD, target_BD)
    squared_BK = gram_BKK.diagonal(dim1=1, dim2=2)
    able_BK = active_BK & (squared_BK > 0)
    inverse_BK = torch.where(able_BK, 1 / squared_BK, 0.0)
    z_BK = torch.zeros_like(products_BK) if start_BK is None else start_BK.clone()
    for _ in range(SWEEPS):
        before_BK = z_BK.clone()
        for n in range(z_BK.shape[1]):
            left_B = products_BK[:, n] - torch.einsum("bk,bk->b", gram_BKK[:, n], z_BK)
            z_BK[:, n] = (z_BK[:, n] + left_B * inverse_BK[:, n]).relu() * able_BK[:, n]
        if bool(((z_BK - before_BK).abs().amax(1) <= SETTLED * z_BK.amax(1)).all()):
            break
    return z_BK
