"""Profiles of latents, bases and extensions: frequency, activation, token entropy and multitoken ratio.

Profiles are accumulated batch by batch. Latents are given as sparse codes. Bases and extensions have no sparse codes:
their activations ``relu(u)`` and ``relu(v)`` are dense, with about half above 0. They are computed a few windows at a
time and are best measured on fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder
from kronsae.eval.hooked import Windows
from kronsae.eval.latents import LatentMeter, LatentStatistics, rounded
from kronsae.eval.token_entropy import MAX_PAIRS, PairSums, dense_entropies
from kronsae.support.config import to_dict

DENSE_TOKENS, DENSE_UNITS = 512, 512  # block of dense activations: 1 MiB, which fits in the cache
MAX_TABLE = 2**26  # entries of the table of sums by token and pre-latent for the dense token entropy: 512 MiB

Optionals = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class ProfileSummary:
    """Summary of a profile: medians over the living units (the upper of two middle values); None if none is living.

    Args:
        units: number of units.
        living: number of units active on at least one token.
        frequency, mean_activation, token_entropy, multitoken_ratio: medians.
    """

    units: int
    living: int
    frequency: float | None
    mean_activation: float | None
    token_entropy: float | None
    multitoken_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profile of units (latents, bases or extensions) over a set of tokens; tuples by unit.

    Args:
        activity: activation statistics.
        token_entropy: ``-sum_i p_i ln p_i`` in nats, where ``p_i`` is the share of the unit's total activation on token
            i of the vocabulary; None for units that are never active or were not measured.
        entropy_tokens: number of tokens used for the token entropy: the first ones of the set.
        entropy_units: number of units for which the token entropy was computed.
        multitoken_ratio: share of a window's tokens on which the unit is active, mean over the windows in which it is
            active; None if it is never active. A unit that is active once per window has ``1 / length``.
    """

    activity: LatentStatistics
    token_entropy: Optionals
    entropy_tokens: int
    entropy_units: int
    multitoken_ratio: Optionals

    def summary(self) -> ProfileSummary:
        """Return the medians over the living units."""
        living = [unit for unit, count in enumerate(self.activity.active_tokens) if count]
        return ProfileSummary(
            units=len(self.activity.active_tokens),
            living=len(living),
            frequency=_median([self.activity.active_tokens[unit] / self.activity.tokens for unit in living]),
            mean_activation=_median([self.activity.mean_activation[unit] for unit in living]),
            token_entropy=_median([self.token_entropy[unit] for unit in living]),
            multitoken_ratio=_median([self.multitoken_ratio[unit] for unit in living]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return to_dict(self)


class ProfileMeter:
    """Accumulator of the `Profile` of an SAE's latents from codes.

    Memory: six numbers per latent, and 16 bytes for each pair of a latent and a vocabulary token on which it was active
    (`PairSums`), for at most ``max_pairs`` pairs.
    """

    def __init__(self, d_sae: int, vocabulary: int, max_pairs: int = MAX_PAIRS) -> None:
        self.activity = LatentMeter(d_sae)
        self._pairs = PairSums(d_sae, vocabulary, max_pairs)
        self._entropy_tokens = 0
        self._multitoken = _Multitoken(d_sae)

    @property
    def num_pairs(self) -> int:
        """Number of stored pairs of a latent and a token."""
        return self._pairs.num_pairs

    def update(self, windows: Windows, codes: SparseCodes) -> None:
        """Add whole windows, with the codes of their kept tokens."""
        self.activity.update(codes)
        active_NK = codes.active
        row_E = active_NK.nonzero()[:, 0].cpu()
        latent_E, value_E = codes.indices[active_NK].cpu(), codes.values[active_NK].detach().float().cpu()
        window_N, _ = windows.keep_ST.nonzero(as_tuple=True)
        token_N = windows.input_ids_ST[windows.keep_ST].long()
        if self._pairs.add(latent_E, token_N[row_E], value_E):
            self._entropy_tokens += len(token_N)
        self._multitoken.update(latent_E, window_N[row_E], windows)

    def value(self) -> Profile:
        """Return the profile of the windows added."""
        return Profile(
            activity=self.activity.value(),
            token_entropy=_optional(self._pairs.entropies()),
            entropy_tokens=self._entropy_tokens,
            entropy_units=len(self.activity.counts_F),
            multitoken_ratio=_optional(self._multitoken.value()),
        )


class PreLatentMeter:
    """Accumulator of the `Profile` of bases or extensions of a Kronecker encoder, from activations.

    Memory: one block of dense activations, and for the token entropy a table of ``vocabulary`` times at most as many
    rows as keep it below ``max_table`` entries. If not all rows fit, the measured ones are drawn at random, seeded.

    Args:
        encoder: the encoder.
        rows_R: rows to measure: row ``h*(M+N) + i`` is base i of head h, row ``h*(M+N) + M + j`` its extension j.
        vocabulary: size of the vocabulary.
        seed: seed of the drawn rows.
    """

    def __init__(
        self,
        encoder: KroneckerEncoder,
        rows_R: Int[Tensor, " R"],
        vocabulary: int,
        *,
        seed: int = 0,
        max_table: int = MAX_TABLE,
    ) -> None:
        self._weight_RD = encoder.weight.detach().flatten(0, 1)[rows_R]
        self._bias_R = encoder.bias.detach().flatten()[rows_R]
        self.activity = LatentMeter(len(rows_R))
        self._multitoken = _Multitoken(len(rows_R))
        number = min(len(rows_R), max_table // vocabulary)
        drawn = torch.randperm(len(rows_R), generator=torch.Generator().manual_seed(seed))[:number]
        self._chosen_C = drawn.sort().values
        self._sums_VC = torch.zeros(vocabulary, number, dtype=torch.float64)

    @torch.no_grad()
    def update(self, windows: Windows, x_ND: Float[Tensor, "N D"]) -> None:
        """Add whole windows, with the activations of their kept tokens."""
        self.activity.tokens += len(x_ND)
        for part, rows in _portions(windows, DENSE_TOKENS):
            part_ND = x_ND[rows].to(self._weight_RD)
            for start in range(0, len(self._bias_R), DENSE_UNITS):
                units = slice(start, min(start + DENSE_UNITS, len(self._bias_R)))
                pre_NC = torch.addmm(self._bias_R[units], part_ND, self._weight_RD[units].T)
                self._update(pre_NC.relu().float().cpu(), units, part)

    def _update(self, value_NC: Tensor, units: slice, part: Windows) -> None:
        self.activity.update_dense(value_NC, units)
        self._multitoken.update_dense(value_NC > 0, units, part)
        drawn = slice(*torch.searchsorted(self._chosen_C, torch.tensor([units.start, units.stop])).tolist())
        token_N = part.input_ids_ST[part.keep_ST].long()
        chosen_NC = value_NC.index_select(1, self._chosen_C[drawn] - units.start)
        self._sums_VC[:, drawn].index_add_(0, token_N, chosen_NC.double())

    def value(self) -> Profile:
        """Return the profile of the windows added."""
        entropy_R = torch.full((len(self._bias_R),), math.nan, dtype=torch.float64)
        entropy_R[self._chosen_C] = dense_entropies(self._sums_VC)
        return Profile(
            activity=self.activity.value(),
            token_entropy=_optional(entropy_R),
            entropy_tokens=self.activity.tokens,
            entropy_units=len(self._chosen_C),
            multitoken_ratio=_optional(self._multitoken.value()),
        )


def pre_latent_rows(encoder: KroneckerEncoder) -> tuple[Int[Tensor, " HM"], Int[Tensor, " HN"]]:
    """Return the rows of all bases and the rows of all extensions, head by head."""
    rows_HP = torch.arange(encoder.bias.numel()).view(encoder.bias.shape)
    return rows_HP[:, : encoder.d_base].flatten(), rows_HP[:, encoder.d_base :].flatten()


class _Multitoken:
    """Accumulator of the multitoken ratio: per unit, the sum of shares of active tokens and the number of windows."""

    def __init__(self, units: int) -> None:
        self._sum_U = torch.zeros(units, dtype=torch.float64)
        self._windows_U = torch.zeros(units, dtype=torch.int64)

    def update(self, unit_E: Tensor, window_E: Tensor, windows: Windows) -> None:
        units, share_S = len(self._sum_U), 1 / windows.keep_ST.sum(1).double()
        self._sum_U.index_add_(0, unit_E, share_S[window_E])
        seen_SU = torch.zeros(len(windows), units, dtype=torch.bool)  # small: windows, not tokens
        seen_SU.view(-1)[window_E * units + unit_E] = True
        self._windows_U += seen_SU.sum(0)

    def update_dense(self, active_NC: Tensor, units: slice, windows: Windows) -> None:
        window_N, _ = windows.keep_ST.nonzero(as_tuple=True)
        count_SC = torch.zeros(len(windows), active_NC.shape[1]).index_add_(0, window_N, active_NC.float())
        length_S1 = windows.keep_ST.sum(1, keepdim=True).clamp_min(1)
        self._sum_U[units] += (count_SC.double() / length_S1).sum(0)
        self._windows_U[units] += (count_SC > 0).sum(0)

    def value(self) -> Tensor:
        return torch.where(self._windows_U > 0, self._sum_U / self._windows_U, math.nan)


def _portions(windows: Windows, tokens: int) -> Iterator[tuple[Windows, slice]]:
    """Yield groups of whole windows of about ``tokens`` kept tokens, with their slice among all kept tokens."""
    size = max(1, tokens // max(1, windows.keep_ST.shape[1]))
    start = 0
    for part in windows.split(size):
        yield part, slice(start, start + part.num_kept)
        start += part.num_kept


def _optional(values: Tensor) -> Optionals:
    """Round to 4 significant digits; NaN becomes None."""
    numbers = values.tolist()
    return tuple(None if math.isnan(value) else rounded([value])[0] for value in numbers)


def _median(values: list[float | None] | list[float]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None
