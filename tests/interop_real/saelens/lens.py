"""Helpers of the checks against sae-lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.core.sae import SAE
from kronsae.interop import formats

TOLERANCE = 1e-5
D_IN = 12


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill the parameters of an SAE of SAELens with random numbers, so that activations are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn + (0.2 if name == "threshold" else 0))


def inputs(tokens: int = 128, d_in: int = D_IN) -> Tensor:
    """Return activations."""
    return torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def difference(ours: SAE, theirs: Any, x: Tensor) -> float:
    """Return the largest difference of latents and reconstructions; the same latents must be active."""
    codes, acts = ours.encode(x), theirs.encode(x)
    dense = codes.to_dense()
    assert torch.equal(dense != 0, acts != 0)
    assert bool((acts != 0).any())
    return max(float((dense - acts).abs().max()), float((ours.decode(codes, x) - theirs(x)).abs().max()))


def read_back(theirs: Any, folder: Path) -> SAE:
    """Save an SAE with SAELens and read it with our reader."""
    theirs.save_model(folder)
    return formats.read(folder).sae
