"""From the tensors of another library to an `SAE`: what its encoder computes, written in our terms, exactly.

- A decoder bias that is subtracted from the input folds into the encoder's bias: ``W (x - b) + c = W x + (c - W b)``.
- ReLU is JumpReLU with a threshold of 0, and a negative threshold of a ReLU's output is one of 0.
- The result is float32; the fold is computed in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import JumpReLUConfig, TopKConfig
from kronsae.support.tensors import aligned

USUAL_L0 = 64
"""l0 of an SAE with thresholds whose files state none; it plans memory and changes no result."""

ROWS_AT_ONCE = 4096


def topk(k: int) -> TopKConfig:
    """Return the sparsifier of a TopK SAE."""
    return TopKConfig(k=k)


def thresholds(d_sae: int, l0: float | None = None) -> JumpReLUConfig:
    """Return the sparsifier of an SAE with a threshold per latent.

    Args:
        d_sae: latents.
        l0: mean number of active latents per token; None: not stated (`USUAL_L0`).
    """
    return JumpReLUConfig(k=min(d_sae, USUAL_L0 if l0 is None else max(1, round(l0))))


@torch.no_grad()
def dense_sae(
    rows_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"],
    W_dec_FO: Float[Tensor, "F O"],
    b_dec_O: Float[Tensor, " O"],
    sparsifier: TopKConfig | JumpReLUConfig,
    *,
    subtracted_D: Float[Tensor, " D"] | None = None,
    thresholds_F: Float[Tensor, " F"] | None = None,
    W_skip_OD: Float[Tensor, "O D"] | None = None,
    transcoder: bool = False,
) -> SAE:
    """Return ``x_hat = sum_f z_f W_dec[f] + b_dec (+ W_skip x)`` with ``z = sparsify(W (x - subtracted) + bias)``.

    Args:
        rows_FD: W, the encoder's rows.
        bias_F: the encoder's bias.
        W_dec_FO: the dictionary.
        b_dec_O: the decoder's bias.
        sparsifier: TopK, or JumpReLU with ``thresholds_F``.
        subtracted_D: vector that the other library subtracts from x first; None: nothing.
        thresholds_F: a latent is active above its threshold and above 0; None: above 0.
        W_skip_OD: the skip connection of a transcoder; None: none.
        transcoder: whether it writes another hook than it reads.
    """
    config = SAEConfig(
        d_in=rows_FD.shape[1],
        encoder=DenseEncoderConfig(d_sae=rows_FD.shape[0]),
        sparsifier=sparsifier,
        write_widths=(W_dec_FO.shape[1],) if transcoder else (),
        skip=W_skip_OD is not None,
    )
    if subtracted_D is not None:
        bias_F = bias_F.double() - _product(rows_FD, subtracted_D)
    weights = {
        "encoder.weight": rows_FD,
        "encoder.bias": bias_F,
        "decoder.W_dec": W_dec_FO,
        "decoder.b_dec": b_dec_O,
    }
    if isinstance(sparsifier, JumpReLUConfig):
        lowest_F = rows_FD.new_zeros(len(rows_FD)) if thresholds_F is None else thresholds_F.clamp_min(0)
        weights["sparsifier.log_threshold"] = lowest_F.double().log()
    if W_skip_OD is not None:
        weights["skip.W_skip"] = W_skip_OD
    with torch.device("meta"):
        sae = config.build_empty()
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    sae.load_state_dict({name: aligned(tensor) for name, tensor in weights.items()}, assign=True)
    return sae.requires_grad_(True)


def _product(rows_FD: Tensor, vector_D: Tensor) -> Tensor:
    """Return ``rows @ vector`` in float64 without a float64 copy of all rows."""
    return torch.cat([part.double() @ vector_D.double() for part in rows_FD.split(ROWS_AT_ONCE)])
