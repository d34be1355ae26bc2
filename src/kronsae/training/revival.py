"""Revival of dead parts of an encoder by reinitialising their rows: an alternative to AuxK, off by default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from kronsae.core.encoders import DenseEncoder, KroneckerEncoder
from kronsae.core.heads import head_grid
from kronsae.core.sae import SAE
from kronsae.core.shares import shares
from kronsae.core.sparsifiers import JumpReLU
from kronsae.kernels import RowAdamW

SCALE = 0.2  # norm of a reinitialised row relative to live rows; at full norm it would dominate them at once


@dataclass(frozen=True)
class Revived:
    """Number of encoder rows that were reinitialised, and the latents that they are parents of."""

    rows: int
    latents_C: Tensor


@torch.no_grad()
def revive(
    sae: SAE,
    optimizer: RowAdamW,
    dead_F: Bool[Tensor, " F"],
    x_BD: Float[Tensor, "B D"],
    x_hat_BD: Float[Tensor, "B D"],
    generator: torch.Generator,
) -> Revived:
    """Reinitialise the encoder rows that have only dead latents: dead latents, or dead bases and extensions.

    A row becomes the direction of the residual ``x - x_hat`` of a token drawn with probability proportional to
    ``||x - x_hat||^2``, with `SCALE` times the mean norm of the live rows, and bias 0 (Bricken et al. 2023). The
    decoder rows of its latents are set from the encoder's, as at initialisation. Their JumpReLU thresholds are set to
    the geometric mean of those of live latents, because the latent never passed the old one and would stay dead.
    Adam's moments of all these rows are set to 0.
    """
    encoder = sae.encoder
    assert isinstance(encoder, DenseEncoder | KroneckerEncoder)
    rows_R, latents_F = _dead_rows(encoder, dead_F)
    if not bool(rows_R.any()) or bool(rows_R.all()):
        return Revived(0, latents_F.nonzero().squeeze(1)[:0])
    weight_RD, bias_R = encoder.weight.view(-1, encoder.d_in), encoder.bias.view(-1)
    residual_BD = shares().rows(x_BD - x_hat_BD)
    share_B = residual_BD.square().sum(1).double().cpu()
    drawn = torch.multinomial(share_B, int(rows_R.sum()), replacement=True, generator=generator).to(x_BD.device)
    directions_CD = torch.nn.functional.normalize(residual_BD[drawn], dim=1)
    weight_RD[rows_R] = directions_CD * weight_RD[~rows_R].norm(dim=1).mean() * SCALE
    bias_R[rows_R] = 0
    sae.W_dec[latents_F] = torch.nn.functional.normalize(encoder.initial_decoder_rows()[latents_F], dim=1)
    restarted = [(encoder.weight, rows_R), (encoder.bias, rows_R), (sae.W_dec, latents_F)]
    if isinstance(sae.sparsifier, JumpReLU):
        log_threshold_F = sae.sparsifier.log_threshold
        log_threshold_F[latents_F] = log_threshold_F[~dead_F].mean()
        restarted.append((log_threshold_F, latents_F))
    for parameter, rows in restarted:
        state = optimizer.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name].view(len(rows), -1)[rows] = 0
    return Revived(int(rows_R.sum()), latents_F.nonzero().squeeze(1))


def _dead_rows(
    encoder: DenseEncoder | KroneckerEncoder, dead_F: Bool[Tensor, " F"]
) -> tuple[Bool[Tensor, " R"], Bool[Tensor, " F"]]:
    """Return the rows whose latents are all dead, and the latents of these rows."""
    grid = head_grid(encoder.config)
    if grid is None:
        return dead_F, dead_F
    alive_HMN, null = grid.of(~dead_F), int(grid.null_symbols)
    bases_HM = ~alive_HMN[:, : grid.d_base].any(2)
    extensions_HN = ~alive_HMN[:, :, : grid.d_extension].any(1)
    base_HM1, extension_H1N = pad(bases_HM, (0, null)).unsqueeze(2), pad(extensions_HN, (0, null)).unsqueeze(1)
    latents_HC = (base_HM1 | extension_H1N).flatten(1)[:, : grid.cells]
    return torch.cat([bases_HM, extensions_HN], dim=1).flatten(), latents_HC.flatten()
