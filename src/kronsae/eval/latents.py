"""Activation statistics of each latent, and the selection of latents to show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.checks import check_positive
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.sae import SAE
from kronsae.support.config import to_dict
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of every latent over a set of tokens; tuples of length d_sae, by latent index.

    Args:
        tokens: number of tokens.
        active_tokens: number of tokens on which each latent is active; divided by ``tokens``, its frequency.
        min_activation: smallest activation above 0; 0 for a latent that is never active.
        max_activation: largest activation; 0 for a latent that is never active.
        mean_activation: mean over the tokens on which the latent is active; 0 for a latent that is never active.
    """

    tokens: int
    active_tokens: tuple[int, ...]
    min_activation: tuple[float, ...]
    max_activation: tuple[float, ...]
    mean_activation: tuple[float, ...]

    @property
    def frequencies(self) -> list[float]:
        """The share of tokens on which each latent is active."""
        return [count / self.tokens for count in self.active_tokens]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


class LatentMeter:
    """Accumulator of `LatentStatistics`: four numbers per latent, independent of the number of tokens."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.counts_F = torch.zeros(d_sae, dtype=torch.int64)
        self._min_F = torch.full((d_sae,), torch.inf)
        self._max_F = torch.zeros(d_sae)
        self._sum_F = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, codes: SparseCodes) -> None:
        """Add a batch of codes."""
        active = codes.active
        indices_E, values_E = codes.indices[active].cpu(), codes.values[active].detach().float().cpu()
        self.tokens += active.shape[:-1].numel()
        self.counts_F += torch.bincount(indices_E, minlength=len(self.counts_F))
        self._min_F.scatter_reduce_(0, indices_E, values_E, "amin")
        self._max_F.scatter_reduce_(0, indices_E, values_E, "amax")
        self._sum_F.index_add_(0, indices_E, values_E.double())

    def update_dense(self, values_BC: Float[Tensor, "B C"], units: slice) -> None:
        """Add dense activations >= 0 of some units, on the CPU. The caller must update `tokens`."""
        if len(values_BC) == 0:
            return
        active_BC = values_BC > 0
        self.counts_F[units] += active_BC.sum(0)
        infinite = torch.tensor(torch.inf, dtype=values_BC.dtype)  # a Python scalar would be cast per element
        smallest_C = torch.where(active_BC, values_BC, infinite).amin(0)
        self._min_F[units] = torch.minimum(self._min_F[units], smallest_C)
        self._max_F[units] = torch.maximum(self._max_F[units], values_BC.amax(0))
        self._sum_F[units] += values_BC.sum(0, dtype=torch.float64)

    def value(self) -> LatentStatistics:
        """Return the statistics over the batches added."""
        return LatentStatistics(
            tokens=self.tokens,
            active_tokens=tuple(self.counts_F.tolist()),
            min_activation=rounded(self._min_F.masked_fill(self.counts_F == 0, 0.0).tolist()),
            max_activation=rounded(self._max_F.tolist()),
            mean_activation=rounded((self._sum_F / self.counts_F.clamp_min(1)).tolist()),
        )


@torch.no_grad()
def latent_statistics(sae: SAE, batches: Iterable[Tensor]) -> LatentStatistics:
    """Return the statistics of all latents of ``sae`` over activations ``[B, d_in]``, one batch in memory at a time."""
    meter = LatentMeter(sae.d_sae)
    for x_BD in batches:
        meter.update(sae.encode(x_BD.to(sae.W_dec)))
    return meter.value()


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Which latents are shown with contexts, and how many contexts.

    Args:
        num_latents: number of sampled latents, spread evenly over the frequencies of the living latents.
        num_heads: number of complete heads to show (Kronecker encoders).
        max_cells: maximum total number of latents in those heads; at least one head is always shown.
        top: number of contexts of the largest activations, per latent, without near-copies.
        sampled: number of contexts of random activations, per latent; they show what the top contexts do not.
        cell_contexts: the same per cell, base and extension of a head.
        quantiles: number of quantile bands of a latent's activations; 0 for no bands.
        quantile_contexts: number of random contexts from each band.
        negatives: number of random contexts from windows in which the latent is not active, per latent.
        latents: indices of latents that are always shown, before the sample.
        window: tokens on either side of the activation (paper: 15).
        seed: seed of the selection of latents and contexts.
    """

    num_latents: int = 24
    num_heads: int = 4
    max_cells: int = 256
    top: int = 6
    sampled: int = 3
    cell_contexts: int = 4
    window: int = 15
    quantiles: int = 0
    quantile_contexts: int = 2
    negatives: int = 0
    latents: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top", "cell_contexts", "max_cells", "quantile_contexts"):
            check_positive(f"gallery.{name}", getattr(self, name))
        for name in ("num_latents", "num_heads", "sampled", "window", "quantiles", "negatives"):
            if getattr(self, name) < 0:
                raise UserError(f"gallery.{name} must be at least 0; got {getattr(self, name)!r}.")


def choose_latents(counts_F: Int[Tensor, " F"], number: int, seed: int) -> list[int]:
    """Choose living latents spread over the frequencies, from the most frequent to the rarest.

    The living latents are sorted by count (ties by index) and split into ``number`` equal parts; one is drawn from each
    part, seeded. Latents that are never active are not chosen. If fewer than ``number`` are living, all are chosen.
    """
    living = counts_F.argsort(descending=True, stable=True)[: int((counts_F > 0).sum())].tolist()
    if len(living) <= number:
        return living
    generator = torch.Generator().manual_seed(seed)
    borders = [part * len(living) // number for part in range(number + 1)] if number else []
    return [
        living[int(torch.randint(start, stop, (1,), generator=generator))]
        for start, stop in itertools.pairwise(borders)
    ]


def choose_heads(counts_F: Int[Tensor, " F"], encoder: KroneckerEncoder, number: int) -> list[int]:
    """Choose the heads with the most living latents; ties go to the head whose rarest latent is the most frequent.

    This prefers heads in which every cell shows how base and extension compose. Heads without a living latent are not
    chosen. Remaining ties go to the lower index.
    """
    counts_HC = counts_F.view(encoder.num_heads, -1)
    living_H, rarest_H = (counts_HC > 0).sum(1).tolist(), counts_HC.amin(1).tolist()
    order = sorted(range(encoder.num_heads), key=lambda head: (-living_H[head], -rarest_H[head], head))
    return [head for head in order[:number] if living_H[head]]


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Round to 4 significant digits: enough for display, and half the file size."""
    return tuple(float(f"{value:.4g}") for value in values)
