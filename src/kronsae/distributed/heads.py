"""Head parallel: a dictionary whose latents the processes of a row of the mesh hold in equal, consecutive parts.

Each process encodes with its own rows and offers the k best of its own latents. A latent that is not among the k best
of its part has k latents before it, so it is not among the k best of all: the k best of the offers are exact. All
processes of the row gather the offers and make the same choice, so each has the codes of the whole dictionary; only
the values of its own latents carry a gradient. Each decodes its own latents, and the reconstructions are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import (
    DenseEncoderConfig,
    KroneckerEncoderConfig,
    Latents,
    Ranked,
    choose_ranked,
    first_by_rank,
    restricted,
)
from kronsae.core.experts import gate_of
from kronsae.core.gates import GATES
from kronsae.core.sae import SAE, SAEConfig
from kronsae.distributed.shares import TokenShares
from kronsae.distributed.team import Group
from kronsae.kernels import BatchChoice, Choice, Pursued, PursuitRounds, Request, RowGradients, grad_norm
from kronsae.support.errors import UserError

DIVIDED = ("encoder.weight", "encoder.bias", "decoder.W_dec")
"""Weights of which each process holds a part, along the first dimension; all others are in every process."""


class HeadSplit:
    """Implements `kronsae.training.split.Split`: equal, consecutive parts of the heads; without heads, of the latents.

    Args:
        group: the processes that hold the parts of one dictionary. One process holds all of it.
        among: who shares the batches.
    """

    def __init__(self, group: Group, among: TokenShares) -> None:
        self.group, self.among = group, among

    def build(self, shape: SAEConfig, seed: int) -> SAE:
        check_divisible(shape, self.group.size)
        sae = shape.build(seed)
        if self.group.size > 1:
            sae = self._part_of(sae, shape)
        sae.encoder.register_forward_hook(self._merging)
        return sae

    def grad_norm(self, sae: SAE, rows: RowGradients) -> float:
        divided: list[Tensor] = []
        common: list[Tensor] = []
        for name, parameter in sae.named_parameters():
            (divided if name in DIVIDED else common).append(parameter)
        squares = torch.tensor(grad_norm(divided, rows) ** 2, dtype=torch.float64)
        return math.sqrt(float(self.group.sum(squares)) + grad_norm(common, rows) ** 2)

    def whole(self, sae: SAE, shape: SAEConfig) -> SAE:
        found = shape.build_empty().to(sae.W_dec)
        weights = sae.state_dict()
        for name in DIVIDED if self.group.size > 1 else ():  # other encoders, which are not divided, have other names
            weights[name] = torch.cat(self.group.gather(weights[name]))
        found.load_state_dict(weights)
        return found

    def _part_of(self, whole: SAE, shape: SAEConfig) -> SAE:
        parts, me = self.group.size, self.group.me
        sae = SAE(
            _encoder_of_part(shape, parts).build(shape.d_in),
            whole.sparsifier,
            DividedDecoder(shape.d_sae // parts, shape.d_out, self.group),  # type: ignore[arg-type]
            whole.skip,
            read_widths=shape.read_widths,
            write_widths=shape.write_widths,
            pursuit=shape.pursuit,
        )
        weights = whole.state_dict()
        sae.load_state_dict(weights | {name: weights[name].chunk(parts)[me] for name in DIVIDED})
        return sae

    def _merging(self, encoder: nn.Module, inputs: Any, latents: Latents) -> MergedLatents:
        """Forward hook of the encoder."""
        return MergedLatents(latents, self.group, self.among, encoder.d_sae)  # type: ignore[arg-type]


def check_divisible(shape: SAEConfig, parts: int) -> None:
    """Refuse an SAE that cannot be held in so many parts.

    Raises:
        UserError: saying which rule is broken.
    """
    if parts == 1:
        return
    encoder = shape.encoder
    if not isinstance(encoder, DenseEncoderConfig | KroneckerEncoderConfig):
        raise UserError(
            f"head_parallel must be 1 with a {encoder.kind} encoder; got {parts}. Only dense and Kronecker encoders "
            "are divided. Leave --head-parallel out: the processes then share the tokens."
        )
    count, what = _count(encoder)
    if count % parts:
        raise UserError(
            f"head_parallel must divide {what}; got {parts} with {what}={count}. Change one, or leave --head-parallel "
            "out: the processes then share the tokens."
        )
    gate = gate_of(encoder)
    for unsupported, name in (
        (shape.sparsifier.kind == "jumprelu", "the sparsifier 'jumprelu'"),
        (gate is not None and GATES[gate].start is not None, f"the gate '{gate}', whose parameter all heads share"),
        (isinstance(encoder, KroneckerEncoderConfig) and encoder.null_symbols, "null_symbols"),
    ):
        if unsupported:
            raise UserError(
                f"head_parallel must be 1 with {name}; got {parts}. Leave --head-parallel out: the processes then "
                "share the tokens."
            )


def _count(encoder: DenseEncoderConfig | KroneckerEncoderConfig) -> tuple[int, str]:
    return (encoder.d_sae, "d_sae") if isinstance(encoder, DenseEncoderConfig) else (encoder.num_heads, "num_heads")


def _encoder_of_part(shape: SAEConfig, parts: int) -> DenseEncoderConfig | KroneckerEncoderConfig:
    """Return the config of an encoder of one part."""
    encoder = shape.encoder
    assert isinstance(encoder, DenseEncoderConfig | KroneckerEncoderConfig)
    if isinstance(encoder, DenseEncoderConfig):
        return replace(encoder, d_sae=encoder.d_sae // parts)
    return KroneckerEncoderConfig(
        num_heads=encoder.num_heads // parts,
        d_base=encoder.d_base,
        d_extension=encoder.d_extension,
        gate=encoder.gate,
        init_norm=encoder.init_norm,
    )


@dataclass(frozen=True)
class MergedLatents:
    """Implements `kronsae.core.encoders.Latents`: the latents of all parts, of which this process computes one.

    A choice is merged from the offers of the row of the mesh; a choice among the whole batch also from those of the
    other shares of the batch.

    Args:
        own: the latents of this process.
        group: the processes that hold the parts of the dictionary.
        among: who shares the batch.
        d_own: number of latents in one part.
    """

    own: Latents
    group: Group
    among: TokenShares
    d_own: int

    @property
    def num_tokens(self) -> int:
        return self.own.num_tokens

    @property
    def d_sae(self) -> int:
        """F, the latents of all parts."""
        return self.d_own * self.group.size

    @property
    def first(self) -> int:
        """Index of the first own latent."""
        return self.d_own * self.group.me

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        own = [self._restricted(request) for request in requests]
        found = choose_ranked(self.own, [request for request in own if request is not None])
        nothing, left = found[0].none(), iter(found)
        return tuple(
            self._merged(request, nothing if part is None else next(left))
            for request, part in zip(requests, own, strict=True)
        )

    def materialize(self) -> Float[Tensor, "B F"]:
        """All F activations; only those of the own latents carry a gradient."""
        own_BC = self.own.materialize()
        parts = self.group.gather(own_BC.detach())
        parts[self.group.me] = own_BC
        return torch.cat(parts, dim=1)

    def penalty(self) -> Float[Tensor, ""] | None:
        return self.own.penalty()

    def _restricted(self, request: Request) -> Request | None:
        """Return the request to the own latents; None if it is for none of them."""
        if not isinstance(request, Choice) or self.group.size == 1:
            return request
        own = restricted(request, self.first, self.d_own)
        return own if own.k else None

    def _merged(self, request: Request, offer: Ranked) -> SparseCodes:
        """Return the codes of the whole dictionary that meet a request, from the own offer and those of others."""
        if self.group.size > 1:
            offer = self._best_of_group(request, offer)
        if isinstance(request, BatchChoice):
            return offer.codes.only(largest_of_batch(offer, request.total, self.among))
        return offer.codes

    def _best_of_group(self, request: Request, offer: Ranked) -> Ranked:
        """Return the best of the offers of all parts; those of the own part are differentiable."""
        widest = int(self.group.max(torch.tensor(offer.rank_BK.shape[1])))
        missing = (0, widest - offer.rank_BK.shape[1])
        own_BK, indices_BK, rank_BK = (
            nn.functional.pad(part, missing)
            for part in (offer.codes.values, offer.codes.indices + self.first, offer.rank_BK)
        )
        values = self.group.gather(own_BK.detach())
        values[self.group.me] = own_BK
        indices_BX = torch.cat(self.group.gather(indices_BK), dim=1)
        rank_BX = torch.cat(self.group.gather(rank_BK), dim=1)
        codes = SparseCodes(torch.cat(values, dim=1), indices_BX, self.d_sae)
        if isinstance(request, Choice):
            kept_BK = first_by_rank(rank_BX, indices_BX)[:, : request.k]
            found = (part.gather(1, kept_BK) for part in (codes.values, codes.indices, rank_BX))
            values_BK, indices_BK, rank_BK = found
            return Ranked(SparseCodes(values_BK, indices_BK, self.d_sae), rank_BK)
        return Ranked(codes, rank_BX)


@torch.no_grad()
def largest_of_batch(offer: Ranked, total: int, among: TokenShares) -> Bool[Tensor, "B K"]:
    """Mark the ``total`` largest ranks of the whole batch; of equal ones the earlier token, then the smaller latent.

    Every process gathers the ranks of all shares, at most ``total`` of each.
    """
    rank_BK = offer.rank_BK
    offered_N = rank_BK[rank_BK > 0]
    if int(among.sum(torch.tensor(len(offered_N)))) <= total:
        return rank_BK > 0
    all_N = torch.cat(among.gather(offered_N.topk(min(total, len(offered_N)), sorted=False).values))
    smallest = all_N.topk(total).values[-1]
    room = total - int((all_N > smallest).sum())
    return (rank_BK > smallest) | _first_ties(offer, smallest, room, among)


def _first_ties(offer: Ranked, smallest: Tensor, room: int, among: TokenShares) -> Bool[Tensor, "B K"]:
    """Mark the first ``room`` entries of the batch that rank ``smallest``."""
    tied_BK = offer.rank_BK == smallest
    here_N, column_N = tied_BK.nonzero(as_tuple=True)
    place_N = among.place_of(here_N) * offer.codes.d_sae + offer.codes.indices[here_N, column_N]
    last = torch.cat(among.gather(place_N)).sort().values[room - 1]
    marked_BK = torch.zeros_like(tied_BK)
    marked_BK[here_N, column_N] = place_N <= last
    return marked_BK


class DividedDecoder(nn.Module):
    """Own rows of a `kronsae.core.decoders.Decoder`; it takes codes of the whole dictionary and sums over the group.

    Args:
        d_own: own latents.
        d_out: O.
        group: the processes that hold the parts of the dictionary.
    """

    normalize = Decoder.normalize
    rows = Decoder.rows

    def __init__(self, d_own: int, d_out: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self.W_dec = nn.Parameter(torch.empty(d_own, d_out))
        self.b_dec = nn.Parameter(torch.empty(d_out))

    def forward(self, codes: SparseCodes) -> Float[Tensor, "B O"]:
        """Return the reconstruction."""
        return self.combine(codes) + self.b_dec

    def combine(self, codes: SparseCodes) -> Float[Tensor, "B O"]:
        """Return the reconstruction without ``b_dec``."""
        own_BK, rows_BK = self._rows(codes.indices)
        seen_BK: Tensor = _Seen.apply(codes.values, self._group)  # values of others may depend on own ones: a pursuit
        own = SparseCodes(seen_BK, rows_BK, len(self.W_dec)).only(own_BK)
        part_BO = kernels.decode(own.values, own.indices, self.W_dec, torch.zeros_like(self.b_dec))
        return self._summed(part_BO)

    def products(self, x_BO: Float[Tensor, "B O"], latents_BR: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Return ``<d_f, x>`` for R latents of each token; differentiable."""
        own_BR, rows_BR = self._rows(latents_BR)
        seen_BO: Tensor = _Seen.apply(x_BO, self._group)
        products_BR = kernels.sampled_products(seen_BO, self.W_dec, rows_BR)
        no_bias_F = self.W_dec.new_zeros(len(self.W_dec))
        products_BR = kernels.linear_at(seen_BO, self.W_dec, no_bias_F, rows_BR, products_BR)
        return self._summed(torch.where(own_BR, products_BR, 0.0))

    def inverse_norms(self, latents_BR: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Return ``1 / |d_f|`` for R latents of each token, a constant."""
        own_BR, rows_BR = self._rows(latents_BR)
        return self._group.sum(torch.where(own_BR, kernels.inverse_norms(self.W_dec.detach())[rows_BR], 0.0))

    @torch.no_grad()
    def pursue(self, target_BO: Float[Tensor, "B O"], candidates: SparseCodes, rounds: PursuitRounds) -> Pursued:
        """Return the pursuit of a target, less the bias, among the candidates; it has no gradient."""
        inverse_BC = self.inverse_norms(candidates.indices)
        proposed = (candidates.values, candidates.indices)
        rows = self.rows(candidates)  # type: ignore[misc]  # Decoder's method, which calls only what this class has too
        return kernels.pursue_by(rows, inverse_BC, target_BO, *proposed, rounds)

    def _rows(self, latents_BR: Int[Tensor, "B R"]) -> tuple[Bool[Tensor, "B R"], Int[Tensor, "B R"]]:
        """Return which latents are own ones, and their rows; 0 for the others."""
        rows_BR = latents_BR - len(self.W_dec) * self._group.me
        own_BR = (rows_BR >= 0) & (rows_BR < len(self.W_dec))
        return own_BR, rows_BR.where(own_BR, 0)

    def _summed(self, part: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(part, self._group)
        return summed


class _Sum(torch.autograd.Function):
    """Sum over a group whose processes go on alike from it: the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return group.sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Seen(torch.autograd.Function):
    """What all processes of a group have and each uses for its own latents: the gradients of these uses add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.group.sum(grad), None
