"""An encoder with a dense trunk: some latents have a row of their own, the others are cells of Kronecker heads.

Heads are cheap, but the latents of a head disturb each other: of two that are active at once, four cells see both
parents. Frequent latents cause most of this. With a trunk, training can give them rows of their own: nothing assigns
latents to the two parts, and both are selected by one k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import (
    DenseEncoder,
    DenseEncoderConfig,
    KroneckerEncoder,
    KroneckerEncoderConfig,
    Latents,
    choose_ranked,
    first_by_rank,
    restricted,
)
from kronsae.kernels import Above, BatchChoice, Choice, Request
from kronsae.support.errors import UserError
from kronsae.support.tensors import aligned


@dataclass(frozen=True, kw_only=True)
class TrunkEncoderConfig:
    """Config of a dense encoder, the trunk, and Kronecker heads; the trunk's latents come first in the dictionary.

    Args:
        trunk: the latents with rows of their own. Their number is a multiple of a head's, so that groups of latents
            can end between heads.
        heads: the other latents.
    """

    kind: ClassVar[str] = "trunk"
    trunk: DenseEncoderConfig
    heads: KroneckerEncoderConfig

    def __post_init__(self) -> None:
        check_trunk(self.trunk.d_sae, self.heads.block)

    @property
    def d_sae(self) -> int:
        """F, the latents of both parts."""
        return self.trunk.d_sae + self.heads.d_sae

    @property
    def block(self) -> int:
        """Smallest number of latents that a group boundary may not split: those of one head."""
        return self.heads.block

    @property
    def latents_per_token(self) -> int:
        """Largest number of latents that one token can activate."""
        return self.d_sae

    def build(self, d_in: int) -> TrunkEncoder:
        """Return the encoder for inputs of width ``d_in``, not yet initialised."""
        return TrunkEncoder(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass: those of both parts."""
        return self.trunk.multiply_adds(d_in) + self.heads.multiply_adds(d_in)


def check_trunk(d_trunk: int, cells: int) -> None:
    """Refuse a trunk that is not of the size of a number of heads.

    Raises:
        UserError: with both sizes.
    """
    if d_trunk % cells:
        raise UserError(
            f"d_trunk must be a multiple of the latents of a head, {cells}; got {d_trunk}. Change it or the shape of "
            "the heads."
        )


class TrunkEncoder(nn.Module):
    """Union of a `DenseEncoder` and a `KroneckerEncoder`; latent f of the heads has index ``trunk.d_sae + f``."""

    def __init__(self, config: TrunkEncoderConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.trunk: DenseEncoder = config.trunk.build(d_in)
        self.heads: KroneckerEncoder = config.heads.build(d_in)

    @property
    def weight(self) -> Float[Tensor, "R D"]:
        """Rows of the trunk, then of the heads: a copy."""
        return torch.cat([self.trunk.weight, self.heads.weight.flatten(0, 1)])

    @property
    def bias(self) -> Float[Tensor, " R"]:
        """Biases of the trunk, then of the heads: a copy."""
        return torch.cat([self.trunk.bias, self.heads.bias.flatten()])

    def forward(self, x_BD: Float[Tensor, "B D"]) -> UnionLatents:
        x_BD = aligned(x_BD)
        return UnionLatents((self.trunk(x_BD), self.heads(x_BD)), (self.trunk.d_sae, self.heads.d_sae))

    @torch.no_grad()
    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights for raw x instead of ``(x - mean) / scale``, with latents scaled by ``latent_scale``."""
        self.trunk.fold(mean_D, scale_D, latent_scale)
        self.heads.fold(mean_D, scale_D, latent_scale)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialise both parts, with the scale of the whole dictionary where no norm is given."""
        for part in (self.trunk, self.heads):
            part.initialize(generator)
            if part.config.init_norm is None:
                part.weight.mul_((part.d_sae / self.d_sae) ** 0.5)

    @torch.no_grad()
    def initial_decoder_rows(self) -> Float[Tensor, "F D"]:
        """Return the decoder rows of both parts."""
        return torch.cat([self.trunk.initial_decoder_rows(), self.heads.initial_decoder_rows()])


@dataclass(frozen=True)
class UnionLatents:
    """Latents of several encoders of the same x, side by side.

    A selection from all is exact: a latent that is not among the k best of its part is not among the k best of all.
    Latents are ordered by value. Of equal values that of the first part comes first, then the order within the part.

    Args:
        parts: latents of each part.
        sizes: how many latents each part has.
    """

    parts: Sequence[Latents]
    sizes: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return self.parts[0].num_tokens

    @property
    def d_sae(self) -> int:
        """F, the latents of all parts."""
        return sum(self.sizes)

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        offers: list[list[SparseCodes]] = [[] for _ in requests]
        first = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            own = [_to_part(request, first, size) for request in requests]
            found = iter(_in_order(part, [request for request in own if request is not None]))
            for request, offer in zip(own, offers, strict=True):
                if request is not None:
                    codes = next(found)
                    offer.append(SparseCodes(codes.values, codes.indices + first, self.d_sae))
            first += size
        return tuple(_merged(request, offer) for request, offer in zip(requests, offers, strict=True))

    def materialize(self) -> Float[Tensor, "B F"]:
        return torch.cat([part.materialize() for part in self.parts], dim=1)

    def penalty(self) -> None:
        return None


def _to_part(request: Request, first: int, size: int) -> Request | None:
    """Return the request to the latents ``first`` to ``first + size``; None if it is for none of them."""
    if isinstance(request, Above):
        return Above(request.thresholds_F[first : first + size])
    if isinstance(request, BatchChoice):
        return request
    own = restricted(request, first, size)
    return own if own.k else None


def _in_order(part: Latents, requests: Sequence[Request]) -> list[SparseCodes]:
    """Return the codes of a part, each token's in the order of the part."""
    ranked = choose_ranked(part, requests)
    return [_columns(one.codes, first_by_rank(one.rank_BK, one.codes.indices)) for one in ranked]


def _merged(request: Request, offers: Sequence[SparseCodes]) -> SparseCodes:
    """Return what meets a request among the offers of all parts."""
    codes = SparseCodes(*_side_by_side(offers), offers[0].d_sae)
    if isinstance(request, Above):
        return codes
    order_BX = codes.values.detach().argsort(dim=1, descending=True, stable=True)
    if isinstance(request, Choice):
        return _columns(codes, order_BX[:, : request.k])
    codes = _columns(codes, order_BX)
    values_N = codes.values.detach().flatten()
    kept_N = values_N.argsort(descending=True, stable=True)[: request.total]
    marked_N = torch.zeros_like(values_N, dtype=torch.bool).index_fill_(0, kept_N, True)
    return codes.only(marked_N.view_as(codes.values) & codes.active)


def _side_by_side(offers: Sequence[SparseCodes]) -> tuple[Float[Tensor, "B X"], Int[Tensor, "B X"]]:
    return torch.cat([codes.values for codes in offers], dim=1), torch.cat([codes.indices for codes in offers], dim=1)


def _columns(codes: SparseCodes, columns_BK: Int[Tensor, "B K"]) -> SparseCodes:
    return SparseCodes(codes.values.gather(1, columns_BK), codes.indices.gather(1, columns_BK), codes.d_sae)
