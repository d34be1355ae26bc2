"""How well an SAE reconstructs: explained variance, error, l0, dead latents."""

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
    """Reconstruction measured on a set of activations.

    Args:
        tokens: size of the set.
        explained_variance: ``1 - sum(||x - x_hat||^2) / sum(||x - mean||^2)``, sums over tokens and dimensions,
            ``mean`` over the set: a ratio of sums, *the* explained variance of this library. None where the
            activations do not vary.
        explained_variance_per_token: mean over tokens of ``1 - ||x - x_hat||^2 / ||x - mean||^2``, the same mean;
            the reading of the paper's listing. A token that equals the mean has no such ratio and is left out.
        mean_squared_error: ``||x - x_hat||^2`` summed over d_in, mean over tokens.
        cosine_similarity: ``x . x_hat / (||x|| ||x_hat||)``, mean over tokens.
        l0: active latents per token, mean over tokens.
        dead_share: share of the latents that are active on none of these ``tokens`` tokens. It falls as the set
            grows: compare it only between equal sets.
        explained_variance_by_hook: where several hooks are written, the explained variance at each, in their order:
            over all of them together those of the largest activations weigh most. Empty where there is one.

    Of a transcoder ``x`` is what it is to write.
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
        """As JSON values; figures by hook only where there are several."""
        figures = to_dict(self)
        if not self.explained_variance_by_hook:
            del figures["explained_variance_by_hook"]
        return figures


class ReconstructionMeter:
    """Accumulates a `Reconstruction` in two passes over the same batches, in memory that does not grow with them.

    `update` is for the first pass; `update_per_token`, which needs the mean that only a whole pass gives, for the
    second.

    Args:
        d_sae: latents.
        widths: of the hooks written, where there are several.
    """

    def __init__(self, d_sae: int, widths: tuple[int, ...] = ()) -> None:
        self.variance = ExplainedVariance()
        self._widths = widths if len(widths) > 1 else ()
        self._by_hook = [ExplainedVariance() for _ in self._widths]
        self._active_F = torch.zeros(d_sae, dtype=torch.bool)
        self._l0 = self._cosine = self._per_token = 0.0
        self._per_token_count = 0

    def update(self, x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"], codes: SparseCodes) -> None:
        """Take in a batch of the first pass."""
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
        """Take in a batch of the second pass."""
        ratios_B = explained_variance_per_token(x_BD, x_hat_BD, self.variance.mean_D.to(x_BD.device))
        ratios_B = ratios_B[ratios_B.isfinite()]
        self._per_token += float(ratios_B.sum())
        self._per_token_count += len(ratios_B)

    def value(self) -> Reconstruction:
        """The figures of the batches taken in; without a second pass there is no figure per token."""
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
    """Measure how ``sae`` reconstructs activations.

    Args:
        sae: any SAE that reconstructs what it reads.
        batches: tensors ``[B, d_in]``, in any division into batches; read twice, one batch held at a time.

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
            f"batches must be readable twice; got a one-shot {type(batches).__name__}. Put it into a list, or give "
            "an object whose __iter__ starts anew."
        )
    if not sae.config.autoencodes:
        raise UserError(
            "reconstruction measures what is reconstructed where it was read; this SAE writes at another hook. Use "
            "`evaluate`, which runs the model and has both."
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
    """The reconstruction and the codes, on the SAE's device and in its dtype."""
    own_BD = x_BD.to(sae.W_dec)
    codes = sae.encode(own_BD)
    return sae.decode(codes, own_BD).to(x_BD.device), codes
