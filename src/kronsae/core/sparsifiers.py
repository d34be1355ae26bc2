"""Sparsifiers choose which latents stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import Latents
from kronsae.errors import UserError
from kronsae.kernels import Choice


@runtime_checkable
class Sparsifier(Protocol):
    """What an `SAE` needs of its sparsifier."""

    def __call__(self, latents: Latents, *also: Choice) -> tuple[SparseCodes, ...]:
        """Its own codes first, then one more for each choice in ``also``, at the price of one product for all."""
        ...


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Keep the k largest latents of each token (Gao et al. 2025)."""

    kind: ClassVar[str] = "topk"
    k: int

    def __post_init__(self) -> None:
        check_count("k", self.k)

    def check(self, d_sae: int) -> None:
        """Refuse a k that the dictionary cannot give."""
        if self.k > d_sae:
            raise UserError(f"k must be at most d_sae; got k={self.k} with d_sae={d_sae}. Lower k or widen.")

    def build(self) -> TopK:
        """The sparsifier."""
        return TopK(self)


SparsifierConfig = TopKConfig


class TopK(nn.Module):
    """``f = TopK(z)``: exact, per token; fewer than k are active where fewer than k latents are positive."""

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: Latents, *also: Choice) -> tuple[SparseCodes, ...]:
        return latents.choose(Choice(self.config.k), *also)
