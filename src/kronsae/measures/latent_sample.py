"""Sampling of single latents, and the places in a text where they are active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.eval.firings import FiringMeter, Firings, FlatText, flat_text
from kronsae.eval.hooked import Windows
from kronsae.runs.loaded import LoadedRun
from kronsae.support.errors import UserError, nearest
from kronsae.support.progress import Progress


def pick_saes(loaded: LoadedRun, names: Sequence[str]) -> dict[str, SAE]:
    """Return the run's SAEs with these names; without names, all SAEs.

    Raises:
        UserError: the run has no such SAE.
    """
    for name in names:
        if name not in loaded.saes:
            known = ", ".join(loaded.saes)
            raise UserError(f"--sae must name an SAE of the run ({known}); got '{name}'.{nearest(name, loaded.saes)}")
    return {name: sae for name, sae in loaded.saes.items() if not names or name in names}


def check_chosen(saes: Mapping[str, SAE], chosen: Sequence[int]) -> None:
    """Raise if a chosen latent does not exist in one of the SAEs."""
    for name, sae in saes.items():
        if too_large := [latent for latent in chosen if latent >= sae.d_sae]:
            raise UserError(f"--latent must be below d_sae={sae.d_sae:,} of '{name}'; got {too_large[0]}.")


@torch.no_grad()
def count_activations(
    loaded: LoadedRun, saes: Mapping[str, SAE], windows: list[Windows], progress: Progress | None = None
) -> dict[str, Int[Tensor, " F"]]:
    """Return, by SAE, the number of tokens of the windows on which each latent is active."""
    counts = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in saes.items()}
    for _, x_ND in loaded.activations(windows, progress):
        for name, sae in saes.items():
            counts[name] += sae.encode(x_ND.to(sae.W_dec)).counts().cpu()
    return counts


def draw_latents(counts_F: Int[Tensor, " F"], number: int, *, at_least: int, seed: int) -> list[int]:
    """Sample ``number`` latents uniformly from those active on ``at_least`` or more tokens; all if there are fewer."""
    eligible = (counts_F >= at_least).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(eligible), generator=generator)[:number]
    return sorted(eligible[order].tolist())


@torch.no_grad()
def find_firings(
    loaded: LoadedRun,
    saes: Mapping[str, SAE],
    windows: list[Windows],
    latents: Mapping[str, Sequence[int]],
    progress: Progress | None = None,
) -> tuple[FlatText, dict[str, dict[int, Firings]]]:
    """Return the windows as one text and, by SAE, the places where each of the latents is active."""
    meters = {name: FiringMeter(sae.d_sae, latents[name]) for name, sae in saes.items()}
    for _, x_ND in loaded.activations(windows, progress):
        for name, sae in saes.items():
            meters[name].update(sae.encode(x_ND.to(sae.W_dec)))
    text = flat_text(windows)
    return text, {name: meter.value(text) for name, meter in meters.items()}
