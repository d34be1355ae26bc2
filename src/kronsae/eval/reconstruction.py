"""Reconstruction metrics: explained variance, error, l0, dead latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kronsae.core.codes import SparseCodes
from kronsae.core.metrics import ExplainedVariance, explained_variance_per_token
from kronsae.core.sae import SAE
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Reconstruction metrics on a set of activations.

    Args:
        tokens: number of tokens.
        explained_variance: ``1 - sum(||x - x_hat||^2) / sum(||x - mean||^2)``, sums over tokens and dimensions, with
            ``mean`` over the set: a ratio of sums, *the* explained variance of this library. None if the activations
            do not vary.
        explained_variance_per_token: mean over tokens of ``1 - ||x - x_hat||^2 / ||x - mean||^2``, with the same mean,
            as in the paper's listing. A token equal to the mean has no ratio and is excluded.
        mean_squared_error: ``||x - x_hat||^2`` summed over d_in, mean over tokens.
        cosine_similarity: ``x . x_hat / (||x|| ||x_hat||)``, mean over tokens.
        l0: active latents per token, mean over tokens.
        dead_share: share of the latents that are active on none of these ``tokens`` tokens. It falls as the number of
            tokens grows: compare it only between sets of equal size.
        explained_variance_by_hook: explained variance at each written hook, in order, if there are several. In the
            joint explained variance, hooks with larger activations weigh more. Empty for one hook.

    For a transcoder, ``x`` is the target activation at the hook it writes.
    """

    tokens: int
    explained_variance: float | None
    explained_variance_per_token: float | None
    mean_squared_error: float
    cosine_similarity: float
    l0: float
    dead_share: float
    explained_variance_by_hook: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; metrics by hook only if there are several hooks."""
        figures = to_dict(self)
        if not self.explained_variance_by_hook:
            del figures["explained_variance_by_hook"]
        return figures


class ReconstructionMeter:
    """Accumulator of a `Reconstruction` in two passes over the same batches, in constant memory.

    `update` is for the first pass. `update_per_token` is for the second pass, because it needs the mean over the whole
    first pass.

    Args:
        d_sae: number of latents.
        widths: widths of the written hooks, if there are several.
    """

    def __init__(self, d_sae: int, widths: tuple[int, ...] = ()) -> None:
        self.variance = ExplainedVariance()
        self._widths = widths if len(widths) > 1 else ()
        self._by_hook = [ExplainedVariance() for _ in self._widths]
        self._active_F = torch.zeros(d_sae, dtype=torch.bool)
        self._l0 = self._cosine = self._per_token = 0.0
        self._per_token_count = 0

    def update(self, x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"], codes: SparseCodes) -> None:
        """Add a batch of the first pass."""
        if len(x_BD) == 0:
            return
        self.variance.update(x_BD, x_hat_BD)
        if self._widths:
            parts = zip(x_BD.split(self._widths, dim=1), x_hat_BD.split(self._widths, dim=1), strict=True)
            for variance, (own_BD, own_hat_BD) in zip(self._by_hook, parts, strict=True):
                variance.update(own_BD, own_hat_BD)
        self._l0 += float(codes.active.sum())
        self._cosine += float(cosine_similarity(x_BD.double(), x_hat_BD.double(), dim=-1).sum())
        self._active_F[codes.indices[codes.active].cpu()] = True

    def update_per_token(self, x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> None:
        """Add a batch of the second pass."""
        ratios_B = explained_variance_per_token(x_BD, x_hat_BD, self.variance.mean_D.to(x_BD.device))
        ratios_B = ratios_B[ratios_B.isfinite()]
        self._per_token += float(ratios_B.sum())
        self._per_token_count += len(ratios_B)

    def value(self) -> Reconstruction:
        """Return the metrics of the batches added; without a second pass, the per-token metric is None."""
        tokens = self.variance.tokens
        if tokens == 0:
            raise UserError("evaluation needs at least one token that is neither padding nor special; got none.")
        return Reconstruction(
            tokens=tokens,
            explained_variance=_or_none(self.variance.value()),
            explained_variance_per_token=self._per_token / self._per_token_count if self._per_token_count else None,
            mean_squared_error=self.variance.mean_squared_error(),
            cosine_similarity=self._cosine / tokens,
            l0=self._l0 / tokens,
            dead_share=1 - float(self._active_F.double().mean()),
            explained_variance_by_hook=tuple(_or_none(variance.value()) for variance in self._by_hook),
        )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def reconstruction(sae: SAE, batches: Iterable[Float[Tensor, "B D"]]) -> Reconstruction:
    """Measure how well ``sae`` reconstructs activations.

    Args:
        sae: an SAE that reconstructs the hook it reads.
        batches: tensors ``[B, d_in]`` of any batch size; read twice, one batch in memory at a time.

    Raises:
        UserError: ``batches`` is empty, or can be read only once.

    Example:
        >>> from kronsae.core.encoders import DenseEncoderConfig
        >>> from kronsae.core.sae import SAEConfig
        >>> from kronsae.core.sparsifiers import TopKConfig
        >>> shape = SAEConfig(d_in=4, encoder=DenseEncoderConfig(d_sae=8), sparsifier=TopKConfig(k=2))
        >>> reconstruction(shape.build(), [torch.randn(16, 4), torch.randn(8, 4)]).tokens
        24
    """
    if isinstance(batches, Iterator):
        raise UserError(
            f"batches must be iterable twice; got a one-shot {type(batches).__name__}. Pass a list, or an object whose "
            "__iter__ starts again."
        )
    if not sae.config.autoencodes:
        raise UserError(
            "reconstruction needs an SAE that writes the hook it reads; this SAE writes another hook. Use `evaluate`, "
            "which runs the model and reads both hooks."
        )
    meter = ReconstructionMeter(sae.d_sae, sae.config.widths_written)
    for x_BD in batches:
        meter.update(x_BD, *encode_decode(sae, x_BD))
    if meter.variance.tokens:
        for x_BD in batches:
            meter.update_per_token(x_BD, encode_decode(sae, x_BD)[0])
    return meter.value()


@torch.no_grad()
def encode_decode(sae: SAE, x_BD: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B O"], SparseCodes]:
    """Return the reconstruction and the codes, on the SAE's device and in its dtype."""
    own_BD = x_BD.to(sae.W_dec)
    codes = sae.encode(own_BD)
    return sae.decode(codes, own_BD).to(x_BD.device), codes
