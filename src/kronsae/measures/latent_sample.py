"""For measurements of single latents: which of an SAE's latents, and where they are active in a text."""

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
    """The run's SAEs of these names; all of them if none is given.

    Raises:
        UserError: the run has no such SAE.
    """
    for name in names:
        if name not in loaded.saes:
            known = ", ".join(loaded.saes)
            raise UserError(f"--sae must name an SAE of the run ({known}); got '{name}'.{nearest(name, loaded.saes)}")
    return {name: sae for name, sae in loaded.saes.items() if not names or name in names}


def check_chosen(saes: Mapping[str, SAE], chosen: Sequence[int]) -> None:
    """Refuse a latent that one of the SAEs does not have."""
    for name, sae in saes.items():
        if too_large := [latent for latent in chosen if latent >= sae.d_sae]:
            raise UserError(f"--latent must be below the {sae.d_sae:,} latents of '{name}'; got {too_large[0]}.")


@torch.no_grad()
def count_activations(
    loaded: LoadedRun, saes: Mapping[str, SAE], windows: list[Windows], progress: Progress | None = None
) -> dict[str, Int[Tensor, " F"]]:
    """On how many tokens of the windows each latent is active, by SAE."""
    counts = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in saes.items()}
    for _, x_ND in loaded.activations(windows, progress):
        for name, sae in saes.items():
            counts[name] += sae.encode(x_ND.to(sae.W_dec)).counts().cpu()
    return counts


def draw_latents(counts_F: Int[Tensor, " F"], number: int, *, at_least: int, seed: int) -> list[int]:
    """``number`` latents drawn uniformly, seeded, among those active on ``at_least`` tokens; all, if they are fewer."""
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
    """The windows as one text, and where each of the latents is active in it, by SAE."""
    meters = {name: FiringMeter(sae.d_sae, latents[name]) for name, sae in saes.items()}
    for _, x_ND in loaded.activations(windows, progress):
        for name, sae in saes.items():
            meters[name].update(sae.encode(x_ND.to(sae.W_dec)))
    text = flat_text(windows)
    return text, {name: meter.value(text) for name, meter in meters.items()}
