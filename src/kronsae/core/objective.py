"""Training objective: reconstruction loss, AuxK for dead latents, and the loss terms of encoder and sparsifier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.losses import LossConfig, SquaredErrorConfig, squared_error
from kronsae.core.pursuit import PursuitLearning, choose_and_pursue, choose_own_and_pursue
from kronsae.core.sae import SAE
from kronsae.core.shares import shares
from kronsae.kernels import Choice
from kronsae.support.errors import UserError
from kronsae.support.tensors import aligned


@dataclass(frozen=True, kw_only=True)
class AuxKConfig:
    """AuxK (Gao et al. 2025): the ``k_aux`` largest dead latents reconstruct the residual of the live latents.

    Args:
        weight: coefficient of the loss.
        k_aux: dead latents selected per token; None: ``d_out // 2``, half the output width.
        dead_after_tokens: a latent is dead if none of the last this many tokens activated it.
    """

    weight: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 1_000_000

    def __post_init__(self) -> None:
        if self.k_aux is not None:
            check_count("aux_k.k_aux", self.k_aux)
        check_count("aux_k.dead_after_tokens", self.dead_after_tokens)
        if not 0 <= self.weight < math.inf:
            raise UserError(f"aux_k.weight must be finite and at least 0; got {self.weight!r}.")


@dataclass(frozen=True)
class Objective:
    """One evaluation of the objective; ``loss`` carries the graph, the other fields are for metrics.

    Of a batch that several processes share, ``loss`` is the summand of the own tokens, and so are ``x_hat`` and the
    codes; the other losses are those of the whole batch.
    """

    loss: Float[Tensor, ""]
    total_loss: Float[Tensor, ""]
    reconstruction_loss: Float[Tensor, ""]
    auxiliary_loss: Float[Tensor, ""] | None
    x_hat_BO: Float[Tensor, "B O"]
    codes: SparseCodes


def objective(
    sae: SAE,
    x_BD: Float[Tensor, "B D"],
    dead_C: Int[Tensor, " C"] | None = None,
    aux_k: AuxKConfig | None = None,
    loss: LossConfig | None = None,
    l0_weight: float = 0.0,
    target_BO: Float[Tensor, "B O"] | None = None,
    pursuit_learning: PursuitLearning = "two_losses",
) -> Objective:
    """Return ``loss(y, y_hat) + weight * ||e - e_hat||^2 + l0_weight * l0 + penalty``; ``e = y - y_hat`` is detached.

    - ``y`` is ``target_BO``; None: ``x``, as for every SAE that is not a transcoder;
    - ``loss`` is ``||y - y_hat||^2`` unless another is given; every ``y_hat`` includes the skip connection;
    - ``e_hat`` is decoded without bias from the ``k_aux`` largest of the latents ``dead_C``, so its gradient reaches
      the encoder and the decoder rows of dead latents; without dead latents this term is absent;
    - the codes of an SAE with a pursuit are pursued (`kronsae.core.pursuit`). Learning with ``"two_losses"``, their
      values are constants, and ``loss(y, y_own)`` is added, with ``y_own`` decoded from the encoder's own codes;
      ``"unrolled"``, the gradient includes all rounds and steps instead;
    - ``l0`` is included only if the sparsifier learns from it (JumpReLU);
    - ``penalty`` is the encoder's own term (the load-balancing loss of a switch encoder).
    """
    x_BD = aligned(x_BD)
    latents = sae.encoder(x_BD)
    dead_choice = _dead_choice(sae, dead_C, aux_k)
    own_codes: SparseCodes | None = None
    if sae.pursuit is None or sae.pursuit.changes_nothing:
        codes, aux_codes, l0 = sae.sparsifier.choose_in_training(latents, *dead_choice)
    else:
        chosen = sae.pursuit, x_BD, latents, sae.decoder, sae.sparsifier.config.k
        if pursuit_learning == "two_losses":
            codes, own_codes, *rest = choose_own_and_pursue(*chosen, *dead_choice)
        else:
            codes, *rest = choose_and_pursue(*chosen, *dead_choice)
        aux_codes, l0 = tuple(rest), None
    reconstruct = SquaredErrorConfig() if loss is None else loss
    target_BO = x_BD if target_BO is None else aligned(target_BO)
    if sae.skip is None:
        reconstruction_loss, x_hat_BO = reconstruct(sae.decoder, codes, target_BO)
    else:  # the dictionary reconstructs the target minus the skip output; this holds for every prefix of the loss
        skipped_BO = sae.skip(x_BD)
        reconstruction_loss, x_hat_BO = reconstruct(sae.decoder, codes, target_BO - skipped_BO)
        x_hat_BO = x_hat_BO + skipped_BO
    total, auxiliary_loss = reconstruction_loss, None
    if own_codes is not None:  # an SAE with a pursuit reconstructs its input and has no skip connection
        total = total + reconstruct(sae.decoder, own_codes, target_BO)[0]
    if aux_k is not None and aux_codes:
        residual_BO = (target_BO - x_hat_BO).detach()
        auxiliary_loss = squared_error(residual_BO, sae.decoder.combine(aux_codes[0]))
        total = total + aux_k.weight * auxiliary_loss
    if l0 is not None:
        total = total + l0_weight * l0
    penalty = latents.penalty()
    if penalty is not None:
        total = total + penalty
    parts = [total, reconstruction_loss] + ([] if auxiliary_loss is None else [auxiliary_loss])
    of_batch = shares().sum(torch.stack([part.detach() for part in parts]))
    return Objective(
        loss=total,
        total_loss=of_batch[0],
        reconstruction_loss=of_batch[1],
        auxiliary_loss=None if auxiliary_loss is None else of_batch[2],
        x_hat_BO=x_hat_BO.detach(),
        codes=codes,
    )


def _dead_choice(sae: SAE, dead_C: Tensor | None, aux_k: AuxKConfig | None) -> list[Choice]:
    """Return AuxK's choice among dead latents; empty if there are none."""
    if aux_k is None or aux_k.weight == 0 or dead_C is None or len(dead_C) == 0:
        return []
    k_aux = max(1, sae.d_out // 2) if aux_k.k_aux is None else aux_k.k_aux
    return [Choice(min(k_aux, len(dead_C)), dead_C)]


class DeadLatents:
    """Number of tokens since each latent was last active; part of the training state and saved with it."""

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since_active_F = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Add the codes of one batch."""
        active_F = torch.zeros_like(self.tokens_since_active_F, dtype=torch.bool)
        active_F[codes.indices[codes.active]] = True
        self.tokens_since_active_F += shares().tokens(codes.values.shape[:-1].numel())
        self.tokens_since_active_F[shares().any(active_F)] = 0

    def dead(self, dead_after_tokens: int) -> Int[Tensor, " C"]:
        """Return the indices of latents that none of the last ``dead_after_tokens`` tokens activated."""
        return (self.tokens_since_active_F >= dead_after_tokens).nonzero().squeeze(1)
