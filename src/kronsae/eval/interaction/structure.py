"""Structure of heads: living cells, number of meanings per parent, and what latents inherit from their parents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.heads import HeadGrid
from kronsae.eval.interaction.spread import Spread, effective_number, pearson, significant
from kronsae.eval.latents import LatentStatistics, rounded
from kronsae.eval.profiles import Profile

PROPERTIES = ("frequency", "mean_activation", "max_activation", "token_entropy", "multitoken_ratio")
OF_PARENTS = ("base", "extension", "mean", "product", "mand")


@dataclass(frozen=True, kw_only=True)
class LivingCells:
    """Living cells of the M x N grid over all H heads.

    Args:
        heads_by_living: number of heads with 0, 1, ..., M*N living cells.
        share_by_cell: for each base and extension, the share of heads in which that cell is living.
    """

    heads_by_living: tuple[int, ...]
    share_by_cell: tuple[tuple[float, ...], ...]


def living_cells(statistics: LatentStatistics, grid: HeadGrid) -> LivingCells:
    """Count the living cells: those active on at least one token."""
    alive_HMN = grid.of(torch.tensor(statistics.active_tokens) > 0)
    return LivingCells(
        heads_by_living=tuple(torch.bincount(alive_HMN.flatten(1).sum(1), minlength=grid.cells + 1).tolist()),
        share_by_cell=tuple(rounded(row) for row in alive_HMN.double().mean(0).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Meanings:
    """Number of partners over which the activation of a base (or of an extension) is spread.

    Let ``p_j`` be the share of a base's activation mass (the sum of its N latents over tokens) that is in its latent
    with extension j. The base's effective number of meanings is ``exp(-sum_j p_j ln p_j)``: 1 if all mass is in one
    latent, N if it is spread evenly. Dead parents (without a living latent) are excluded.

    Args:
        possible: the maximum: N for a base, M for an extension.
        effective_number: summary of the effective number over the parents.
        largest_share: summary of ``max_j p_j`` over the parents.
        each: the effective number of every parent, head by head; None for dead parents.
    """

    possible: int
    effective_number: Spread
    largest_share: Spread
    each: tuple[float | None, ...]


def meanings(mass_AB: Float[Tensor, "A B"]) -> Meanings:
    """Return the `Meanings` of A parents, given the activation mass that each shares with its B partners."""
    number_A = effective_number(mass_AB)
    living_A = ~number_A.isnan()
    largest_A = (mass_AB.double() / mass_AB.double().sum(1, keepdim=True)).amax(1)
    return Meanings(
        possible=mass_AB.shape[1],
        effective_number=Spread.of(number_A[living_A]),
        largest_share=Spread.of(largest_A[living_A]),
        each=tuple(None if value != value else significant(value) for value in number_A.tolist()),
    )


def activation_mass(statistics: LatentStatistics, grid: HeadGrid) -> Float[Tensor, "H M N"]:
    """Return the sum of each latent's activation over tokens."""
    mean_F = torch.tensor(statistics.mean_activation, dtype=torch.float64)
    return grid.of(mean_F * torch.tensor(statistics.active_tokens))


@dataclass(frozen=True, kw_only=True)
class ShownGrid:
    """One sampled head: for each base and extension, the frequency of the cell and its share of the base's mass."""

    head: int
    frequency: tuple[tuple[float, ...], ...]
    share_of_base: tuple[tuple[float, ...], ...]


def shown_grids(statistics: LatentStatistics, grid: HeadGrid, heads: list[int]) -> tuple[ShownGrid, ...]:
    """Return the grids of the given heads."""
    frequency_HMN = grid.of(torch.tensor(statistics.active_tokens) / statistics.tokens)
    mass_HMN = activation_mass(statistics, grid)
    share_HMN = (mass_HMN / mass_HMN.sum(2, keepdim=True)).nan_to_num(0.0)
    return tuple(
        ShownGrid(
            head=head,
            frequency=tuple(rounded(row) for row in frequency_HMN[head].tolist()),
            share_of_base=tuple(rounded(row) for row in share_HMN[head].tolist()),
        )
        for head in heads
    )


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """Inheritance: Pearson's r between a property of latents and the same property of their parents.

    Args:
        latents: number of latents: those of the sampled heads that are active on at least ``least_active`` tokens.
        least_active: minimum number of active tokens.
        r: r by property (`PROPERTIES`), then by the function of the parents' properties it is compared with
            (`OF_PARENTS`: the base's a, the extension's b, (a + b) / 2, a * b, sqrt(a * b)); None if one of the two
            does not vary.
    """

    latents: int
    least_active: int
    r: dict[str, dict[str, float | None]]


def inheritance(
    latents: Profile, bases: Profile, extensions: Profile, grid: HeadGrid, least_active: int
) -> Inheritance:
    """Compare the latents of ``grid.num_heads`` heads with the bases and extensions of these heads, head by head."""
    used_C = torch.tensor(latents.activity.active_tokens) >= least_active
    number_C = torch.arange(len(used_C))
    base_C = number_C // grid.d_extension
    extension_C = number_C // grid.cells * grid.d_extension + number_C % grid.d_extension
    own, of_base, of_extension = (_properties(profile) for profile in (latents, bases, extensions))
    return Inheritance(
        latents=int(used_C.sum()),
        least_active=least_active,
        r={
            name: {
                against: pearson(own[name][used_C], of_both[used_C])
                for against, of_both in _of_parents(of_base[name][base_C], of_extension[name][extension_C]).items()
            }
            for name in PROPERTIES
        },
    )


def _of_parents(a_C: Tensor, b_C: Tensor) -> Mapping[str, Tensor]:
    combined = (a_C, b_C, (a_C + b_C) / 2, a_C * b_C, (a_C * b_C).sqrt())
    return dict(zip(OF_PARENTS, combined, strict=True))


def _properties(profile: Profile) -> dict[str, Tensor]:
    """Return the properties by name; NaN where undefined."""
    activity = profile.activity
    columns = (
        activity.frequencies,
        activity.mean_activation,
        activity.max_activation,
        profile.token_entropy,
        profile.multitoken_ratio,
    )
    return {
        name: torch.tensor([torch.nan if value is None else value for value in column], dtype=torch.float64)
        for name, column in zip(PROPERTIES, columns, strict=True)
    }
