"""How often and how strongly each latent is active, and which of them to look at."""

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
    """Every latent over a set of tokens; tuples of length d_sae, by latent number.

    Args:
        tokens: size of the set.
        active_tokens: on how many of them the latent is active. Divided by ``tokens``: its frequency.
        min_activation: its smallest activation above 0; 0 where it is never active.
        max_activation: its largest activation; 0 where it is never active.
        mean_activation: mean of its activation over the tokens on which it is active; 0 where there is none.
    """

    tokens: int
    active_tokens: tuple[int, ...]
    min_activation: tuple[float, ...]
    max_activation: tuple[float, ...]
    mean_activation: tuple[float, ...]

    @property
    def frequencies(self) -> list[float]:
        """Share of the tokens on which each latent is active."""
        return [count / self.tokens for count in self.active_tokens]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return to_dict(self)


class LatentMeter:
    """Accumulates `LatentStatistics`: four numbers per latent, however many tokens."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.counts_F = torch.zeros(d_sae, dtype=torch.int64)
        self._min_F = torch.full((d_sae,), torch.inf)
        self._max_F = torch.zeros(d_sae)
        self._sum_F = torch.zeros(d_sae, dtype=torch.float64)

    def update(self, codes: SparseCodes) -> None:
        """Take in a batch of codes."""
        active = codes.active
        indices_E, values_E = codes.indices[active].cpu(), codes.values[active].detach().float().cpu()
        self.tokens += active.shape[:-1].numel()
        self.counts_F += torch.bincount(indices_E, minlength=len(self.counts_F))
        self._min_F.scatter_reduce_(0, indices_E, values_E, "amin")
        self._max_F.scatter_reduce_(0, indices_E, values_E, "amax")
        self._sum_F.index_add_(0, indices_E, values_E.double())

    def update_dense(self, values_BC: Float[Tensor, "B C"], units: slice) -> None:
        """Take in activations >= 0 of some units, on the CPU: for what has no codes. The caller counts `tokens`."""
        if len(values_BC) == 0:
            return
        active_BC = values_BC > 0
        self.counts_F[units] += active_BC.sum(0)
        infinite = torch.tensor(torch.inf, dtype=values_BC.dtype)  # a plain number would be cast element by element
        smallest_C = torch.where(active_BC, values_BC, infinite).amin(0)
        self._min_F[units] = torch.minimum(self._min_F[units], smallest_C)
        self._max_F[units] = torch.maximum(self._max_F[units], values_BC.amax(0))
        self._sum_F[units] += values_BC.sum(0, dtype=torch.float64)

    def value(self) -> LatentStatistics:
        """The statistics of the batches taken in."""
        return LatentStatistics(
            tokens=self.tokens,
            active_tokens=tuple(self.counts_F.tolist()),
            min_activation=rounded(self._min_F.masked_fill(self.counts_F == 0, 0.0).tolist()),
            max_activation=rounded(self._max_F.tolist()),
            mean_activation=rounded((self._sum_F / self.counts_F.clamp_min(1)).tolist()),
        )


@torch.no_grad()
def latent_statistics(sae: SAE, batches: Iterable[Tensor]) -> LatentStatistics:
    """The statistics of all latents of ``sae`` over activations ``[B, d_in]``, one batch held at a time."""
    meter = LatentMeter(sae.d_sae)
    for x_BD in batches:
        meter.update(sae.encode(x_BD.to(sae.W_dec)))
    return meter.value()


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """Which latents are shown with the text they are active on, and how much of it.

    Args:
        num_latents: latents in the sample, spread evenly over the frequencies of the living.
        num_heads: heads shown whole (Kronecker encoders).
        max_cells: at most so many latents in those heads together, but always one head.
        top: contexts of the largest activations, per latent.
        sampled: contexts of activations drawn at random, per latent: what the top ones do not show.
        cell_contexts: contexts of the largest activations per cell, base and extension of a head.
        quantiles: bands of equal numbers that a latent's activations are cut into, by size; 0: no bands.
        quantile_contexts: contexts drawn at random from each band.
        negatives: contexts drawn at random from windows in which the latent is not active, per latent.
        latents: numbers of latents that are shown in any case, before the sample.
        window: tokens on either side of the activation (paper: 15).
        seed: of the choice of latents, and of the contexts drawn.
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
    """Living latents spread over the frequencies, from the most frequent to the rarest.

    The living are ordered by count (equal ones by number) and cut into ``number`` equal parts, and one is drawn from
    each, seeded. Latents that are never active are not chosen; with fewer living ones than asked for, all are.
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
    """The heads with the most living latents; of equals the one whose rarest latent is the most frequent.

    So a head is shown where its composition can be seen at work in every cell, if there is such a head. Heads
    without a living latent are not chosen. Equal in all of this: the lower number first.
    """
    counts_HC = counts_F.view(encoder.num_heads, -1)
    living_H, rarest_H = (counts_HC > 0).sum(1).tolist(), counts_HC.amin(1).tolist()
    order = sorted(range(encoder.num_heads), key=lambda head: (-living_H[head], -rarest_H[head], head))
    return [head for head in order[:number] if living_H[head]]


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """To 4 significant digits: enough to look at, half the file."""
    return tuple(float(f"{value:.4g}") for value in values)
