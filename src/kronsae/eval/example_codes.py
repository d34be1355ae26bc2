"""Sparse codes of a stored set of activations, and dense columns of a few latents. No ``B x F`` tensor is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kronsae.core.codes import SparseCodes
from kronsae.core.sae import SAE

ROWS = 4096


@torch.no_grad()
def encode_rows(sae: SAE, x_ED: Float[Tensor, "E D"], rows: int = ROWS) -> SparseCodes:
    """Return the codes of all rows on the CPU, encoded ``rows`` at a time; memory is ``E * K * 12`` bytes."""
    parts = []
    for x_BD in x_ED.split(rows):
        codes = sae.encode(x_BD.to(sae.W_dec))
        parts.append(SparseCodes(codes.values.cpu(), codes.indices.cpu(), codes.d_sae))
    return concatenated(parts, sae.d_sae)


def concatenated(parts: Iterable[SparseCodes], d_sae: int) -> SparseCodes:
    """Concatenate codes along tokens; where their K differs, codes with a smaller K are padded."""
    parts = list(parts)
    width = max((part.values.shape[-1] for part in parts), default=0)
    values = [pad(part.values, (0, width - part.values.shape[-1])) for part in parts]
    indices = [pad(part.indices, (0, width - part.indices.shape[-1])) for part in parts]
    if not parts:
        return SparseCodes(torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64), d_sae)
    return SparseCodes(torch.cat(values), torch.cat(indices), d_sae)


def rows_of(codes: SparseCodes, chosen_E: Tensor) -> SparseCodes:
    """Return the codes of selected rows, given as indices or as a mask."""
    return SparseCodes(codes.values[chosen_E], codes.indices[chosen_E], codes.d_sae)


def columns(codes: SparseCodes, latents: Sequence[int]) -> Float[Tensor, "E C"]:
    """Return the activations of distinct latents as dense float32 columns, in the given order."""
    column_of_F = torch.full((codes.d_sae,), -1)
    column_of_F[torch.tensor(list(latents), dtype=torch.int64)] = torch.arange(len(latents))
    column_EK = column_of_F[codes.indices]
    row_A, k_A = (column_EK.ge(0) & codes.active).nonzero(as_tuple=True)
    found_EC = torch.zeros(len(codes.values), len(latents))
    found_EC[row_A, column_EK[row_A, k_A]] = codes.values[row_A, k_A].float()
    return found_EC


def root_mean_square(x_ED: Float[Tensor, "E D"]) -> float:
    """Return the root mean square over all entries, or 1 if all are 0.

    Probes divide activations by it, so that one learning rate works for all models.
    """
    return float(x_ED.double().square().mean().sqrt()) or 1.0


def scaled(codes: SparseCodes, factor: float) -> SparseCodes:
    """Multiply the code values by ``factor``: the codes of rescaled activations under an equally rescaled SAE."""
    return SparseCodes(codes.values * factor, codes.indices, codes.d_sae)
