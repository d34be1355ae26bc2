"""What a selection over Kronecker heads returns, and the arithmetic between a latent and its two parents."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class KroneckerSelection(NamedTuple):
    """K chosen latents per token and the two pre-latents each is composed of.

    ``rows`` number the H*(M+N) pre-latents, heads one after another, bases before extensions within a head.
    """

    indices_BK: Int[Tensor, "B K"]
    base_rows_BK: Int[Tensor, "B K"]
    extension_rows_BK: Int[Tensor, "B K"]


class BatchSelection(NamedTuple):
    """The chosen latents of a batch: K is the largest number any token got, ``chosen`` marks what is not padding."""

    selection: KroneckerSelection
    chosen_BK: Bool[Tensor, "B K"]


class Choice(NamedTuple):
    """A request for the ``k`` largest latents per token, of all or (``latents_C``) of the ones listed."""

    k: int
    latents_C: Int[Tensor, " C"] | None = None


class ChosenPairs(NamedTuple):
    """A selection with its parents' values: ``pre[:, :K]`` are the bases' u, ``pre[:, K:]`` the extensions' v."""

    selection: KroneckerSelection
    rows_BR: Int[Tensor, "B R"]
    pre_BR: Float[Tensor, "B R"]


def parents(indices_BK: Int[Tensor, "... K"], d_base: int, d_extension: int) -> KroneckerSelection:
    """Invert ``index = h*M*N + i*N + j``: base row ``h*(M+N) + i``, extension row ``h*(M+N) + M + j``."""
    head = indices_BK // (d_base * d_extension)
    cell = indices_BK - head * (d_base * d_extension)
    base = cell // d_extension
    first_row = head * (d_base + d_extension)
    return KroneckerSelection(indices_BK, first_row + base, first_row + d_base + (cell - base * d_extension))
