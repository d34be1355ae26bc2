"""Pursuit: the encoder proposes candidates, the decoder decides which of them stay and with which values.

A sparse autoencoder encodes in one step: the k latents of largest pre-activation, with these as values. What k rows of
the dictionary can do for x is more. Of TopK and KronSAE alike, most of what is lost at a given k is lost by values and
ranking, not by the dictionary (`kronsae eval ladder` measures it). A pursuit regains some of it for a few row reads
per token. With the dictionary's rows ``d_f``, unit rows ``u_f = d_f / |d_f|`` and candidates Q, the ``candidates * k``
largest latents of the encoder:

1. round 1 takes the encoder's largest latents, with the encoder's values z;
2. each further round takes, of the candidates left, those of largest positive ``<u_f, e>``, where
   ``e = x - b_dec - sum_f z_f d_f`` is what is not yet explained: alone, f would lower ``|e|^2`` by the square of that.
   Their values start at ``start * <u_f, e> / |d_f|``;
3. each round ends with a refit of all values chosen so far, at once, by projected conjugate gradients on ``|e|^2``:
   a step changes the values by ``a s_f / |d_f|``. The direction s starts as ``g_f = <u_f, e>``, 0 where a value of 0
   would fall; the next one is ``s = g + max(0, <g, g - g'> / <g', g'>) s'``, with g' and s' of the step before (Polak
   and Ribiere 1969, with the customary maximum). The length a minimises ``|e|``. Where a value would become negative,
   the changes are cut so that it becomes 0, the cut changes are scaled by the factor from 0 to 1 that minimises
   ``|e|``, and the next direction is g again. So, apart from rounding, no step raises ``|e|``. The last round takes
   ``refit`` steps, each round before it one; none takes any if ``refit`` is 0.

The rounds share k evenly, the first ones take the remainder. Division by ``|d_f|`` makes all of it independent of how
a latent's scale is split between value and row; where rows are of unit norm it does nothing. Latents that the encoder
gives 0 are no candidates, so fewer than k may be active, as in TopK.

Relatives: matching pursuit (Mallat and Zhang 1993) takes one atom at a time, of all F; orthogonal matching pursuit
(Pati et al. 1993) solves for all values after each, which a few conjugate gradients almost do. ISTA (Daubechies et al.
2004) takes gradient steps of one size with a threshold; LISTA (Gregor and LeCun 2010) learns them. Inference-time
optimisation of SAEs (Nanda et al. 2024) and the amortisation gap (O'Neill et al., arXiv 2411.13117) measure what an
encoder loses to an optimiser; MP-SAE (Costa et al., arXiv 2506.03093) trains with matching pursuit over all F latents.
Here only candidates are looked at, which a factorised encoder finds exactly, so a round costs ``candidates * k`` row
reads instead of F.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae import kernels
from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import Latents
from kronsae.kernels import Choice, Pursued, PursuitRounds
from kronsae.support.errors import UserError

PursuitLearning = Literal["two_losses", "unrolled"]
"""How an SAE with a pursuit learns (`kronsae.core.objective`).

``"two_losses"``: the sum of two reconstruction losses, that of the pursued codes, whose values are constants, and that
of the encoder's own codes. The dictionary learns from both, the encoder from its own codes. ``"unrolled"``: the loss of
the pursued codes alone, differentiated through all rounds and steps.
"""


@dataclass(frozen=True, kw_only=True)
class Pursuit:
    """How codes are pursued; this module's docstring has the formulas.

    ``Pursuit(rounds=1, refit=0)`` is none: the codes are the encoder's, bit for bit.

    Args:
        rounds: how many times latents are chosen, at most k.
        candidates: C; the encoder proposes its ``C * k`` largest latents. One round takes k of them: C is then 1.
        refit: conjugate gradient steps on the values after the last round; 0: none after any round.
        start: share of ``<u_f, e> / |d_f|`` at which a value of a further round starts.
    """

    rounds: int = 2
    candidates: int = 2
    refit: int = 2
    start: float = 0.7

    def __post_init__(self) -> None:
        check_count("pursuit.rounds", self.rounds)
        check_count("pursuit.candidates", self.candidates)
        if isinstance(self.refit, bool) or not isinstance(self.refit, int) or self.refit < 0:
            raise UserError(f"pursuit.refit must be a whole number from 0; got {self.refit!r}.")
        if not 0 < self.start <= 1:
            raise UserError(f"pursuit.start must be above 0 and at most 1; got {self.start!r}.")

    @property
    def changes_nothing(self) -> bool:
        """Whether its codes are the encoder's."""
        return self.rounds == 1 and self.refit == 0

    def proposed(self, k: int) -> int:
        """How many candidates the encoder is asked for: ``C * k``; k where there is one round, which takes these."""
        return k if self.rounds == 1 else self.candidates * k

    def sizes(self, k: int) -> tuple[int, ...]:
        """How many latents each round takes: ``k // rounds``, and one more in each of the first ``k % rounds``."""
        return tuple(k // self.rounds + (number < k % self.rounds) for number in range(self.rounds))

    def planned(self, k: int) -> PursuitRounds:
        """What the rounds do, for `kronsae.kernels.pursue`."""
        steps = (min(self.refit, 1),) * (self.rounds - 1) + (self.refit,)
        return PursuitRounds(self.sizes(k), steps, self.start)

    def multiply_adds(self, k: int, d_in: int) -> int:
        """Multiply-adds per token besides the encoder's and the decoder's: ``d_in`` for each row read.

        A further round reads the candidates left; what is chosen is subtracted, if anything follows; and each refit
        step reads all chosen twice, for their products and for what the step does to the reconstruction.
        """
        rows, chosen, planned = 0, 0, self.planned(k)
        for number, (size, steps) in enumerate(zip(planned.sizes, planned.steps, strict=True)):
            rows += 0 if number == 0 else self.proposed(k) - chosen
            chosen += size
            rows += size if steps or number + 1 < self.rounds else 0
            rows += 2 * steps * chosen
        return rows * d_in

    def check(self, sparsifier: str, k: int, latents_per_token: int, role: str) -> None:
        """Refuse an SAE for which it is not defined.

        Args:
            sparsifier: its kind.
            k: its k.
            latents_per_token: how many latents a token can have.
            role: "" for an SAE, else ``transcoder``, ``crosscoder`` or one of these with a skip connection.

        Raises:
            UserError: saying which rule is broken.
        """
        if role:
            raise UserError(
                f"pursuit needs an SAE of one hook that reconstructs what it reads; got a {role}. What a transcoder is "
                "to write is unknown when it encodes, and the hooks of a crosscoder have no common scale. Leave it out."
            )
        if sparsifier != "topk":
            raise UserError(
                f"pursuit shares out a k that is the same for every token, as sparsifier 'topk' has; got "
                f"'{sparsifier}', whose thresholds were learned for the encoder's own values. Leave pursuit out."
            )
        if self.rounds > k:
            raise UserError(f"pursuit.rounds must be at most k; got {self.rounds} with k={k}. Take fewer rounds.")
        if self.proposed(k) > latents_per_token:
            raise UserError(
                f"pursuit.candidates * k must be at most the latents a token can have, {latents_per_token}; got "
                f"{self.candidates} * {k}. Take fewer candidates."
            )


def choose_and_pursue(
    pursuit: Pursuit, x_BD: Float[Tensor, "B D"], latents: Latents, decoder: Decoder, k: int, *also: Choice
) -> tuple[SparseCodes, ...]:
    """`pursue` among the encoder's candidates, and the codes of each choice in ``also`` for the same product."""
    candidates, *rest = latents.choose(Choice(pursuit.proposed(k)), *also)
    return pursue(pursuit, x_BD, candidates, decoder, k), *rest


def choose_own_and_pursue(
    pursuit: Pursuit, x_BD: Float[Tensor, "B D"], latents: Latents, decoder: Decoder, k: int, *also: Choice
) -> tuple[SparseCodes, ...]:
    """The pursued codes without gradient, the encoder's own k largest latents, and the codes of each other choice."""
    candidates, *rest = latents.choose(Choice(pursuit.proposed(k)), *also)
    with torch.no_grad():
        codes = pursue(pursuit, x_BD, candidates, decoder, k)
    if candidates.values.shape[1] == k:
        return codes, candidates, *rest
    alone = replace(pursuit, rounds=1, refit=0).planned(k)  # a round without refit: the k largest candidates
    own = decoder.pursue(x_BD, candidates, alone)
    values_BK = torch.where(own.places_BK >= 0, candidates.values.gather(1, own.places_BK.clamp_min(0)), 0.0)
    return codes, SparseCodes(values_BK, own.latents_BK, candidates.d_sae), *rest


def pursue(
    pursuit: Pursuit, x_BD: Float[Tensor, "B D"], candidates: SparseCodes, decoder: Decoder, k: int
) -> SparseCodes:
    """The pursued codes, K a token; the columns hold one round after another.

    Which latents are chosen carries no gradient. Under autograd their values do: as functions of the encoder's values
    of round 1, of the dictionary and bias through every residual, and of x. The closer the refit comes to the best
    values, the less these depend on the encoder's: after as many steps as latents, hardly at all. Only ``|d_f|`` is
    held fixed, so the gradient of a row is exact but for its component along the row, which a decoder of unit norm does
    not have.

    Args:
        pursuit: how.
        x_BD: what is to be reconstructed.
        candidates: the encoder's `Pursuit.proposed` largest latents.
        decoder: the dictionary.
        k: latents kept a token.
    """
    if pursuit.changes_nothing:
        return candidates
    target_BD = x_BD - decoder.b_dec
    rounds = pursuit.planned(k)
    found = decoder.pursue(target_BD, candidates, rounds)
    values_BK = found.values_BK
    if torch.is_grad_enabled():
        values_BK = unrolled_values(target_BD, decoder, candidates, found, rounds)
    return SparseCodes(values_BK, found.latents_BK, candidates.d_sae)


def unrolled_values(
    target_BD: Float[Tensor, "B D"],
    decoder: Decoder,
    candidates: SparseCodes,
    found: Pursued,
    rounds: PursuitRounds,
) -> Float[Tensor, "B K"]:
    """``found.values_BK`` again, differentiable in the target, the dictionary and the encoder's values.

    Nothing larger than B x K and B x D is kept; the dictionary's gradient consists of the rows touched.
    """
    inverse_BK = decoder.inverse_norms(found.latents_BK)
    chosen_BK = found.places_BK >= 0
    residual_BD, values_BK = target_BD, target_BD.new_zeros(len(target_BD), 0)
    for number, (size, steps) in enumerate(zip(rounds.sizes, rounds.steps, strict=True)):
        column = values_BK.shape[1]
        new, held = slice(column, column + size), slice(0, column + size)
        latents_BK = found.latents_BK[:, new]
        if number == 0:
            started_BK = candidates.values.gather(1, found.places_BK[:, new].clamp_min(0))
        else:
            started_BK = rounds.start * decoder.products(residual_BD, latents_BK) * inverse_BK[:, new].square()
        started_BK = torch.where(chosen_BK[:, new], started_BK, 0.0)
        residual_BD = residual_BD - decoder.combine(SparseCodes(started_BK, latents_BK, candidates.d_sae))
        values_BK = torch.cat([values_BK, started_BK], dim=1)
        rows = decoder.rows(SparseCodes(values_BK, found.latents_BK[:, held], candidates.d_sae))
        values_BK, residual_BD = kernels.refit_by(
            rows, inverse_BK[:, held], residual_BD, values_BK, chosen_BK[:, held], steps
        )
    return values_BK.masked_fill(found.values_BK.isnan(), torch.nan)
