"""A switch encoder: each token is encoded by one of E smaller encoders, which a router picks (Mudide et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import (
    DenseEncoderConfig,
    DenseLatents,
    EncoderConfig,
    KroneckerEncoderConfig,
    KroneckerLatents,
)
from kronsae.core.gates import GateName
from kronsae.kernels import Choice, Request
from kronsae.support.errors import UserError
from kronsae.support.tensors import aligned

MAX_EXPERTS = 4096
"""Each expert is a module with weights and a product of its own; Mudide et al. use at most 128."""


@dataclass(frozen=True, kw_only=True)
class SwitchEncoderConfig:
    """E experts of equal shape; the dictionary is theirs, one after another.

    Args:
        num_experts: E, at most `MAX_EXPERTS`.
        expert: the shape of one expert; ``d_sae`` of the whole is ``num_experts * expert.d_sae``.
        balance_weight: coefficient of the load-balancing loss, as a multiple of it (Mudide et al.: 3).
    """

    kind: ClassVar[str] = "switch"
    num_experts: int
    expert: DenseEncoderConfig | KroneckerEncoderConfig
    balance_weight: float = 3.0

    def __post_init__(self) -> None:
        check_count("num_experts", self.num_experts)
        if self.num_experts > MAX_EXPERTS:
            raise UserError(
                f"num_experts must be at most {MAX_EXPERTS:,}; got {self.num_experts:,}. "
                "Take fewer and larger experts; 8 is usual."
            )
        check_count("num_experts times an expert's d_sae", self.d_sae)
        if not 0 <= self.balance_weight < math.inf:
            raise UserError(f"balance_weight must be finite and at least 0; got {self.balance_weight!r}.")

    @property
    def d_sae(self) -> int:
        """F, latents of all experts."""
        return self.num_experts * self.expert.d_sae

    @property
    def block(self) -> int:
        """Latents that cannot be parted by the border of a group: an expert's."""
        return self.expert.d_sae

    @property
    def latents_per_token(self) -> int:
        """How many latents one token can have: an expert's."""
        return self.expert.d_sae

    def build(self, d_in: int) -> SwitchEncoder:
        """The encoder for inputs of width ``d_in``, not yet initialised."""
        return SwitchEncoder(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass: the router's ``D * E`` and one expert's."""
        return d_in * self.num_experts + self.expert.multiply_adds(d_in)


AnyEncoderConfig = EncoderConfig | SwitchEncoderConfig


def gate_of(encoder: AnyEncoderConfig) -> GateName | None:
    """The gate of an encoder, or of a switch's experts; None where latents are not composed."""
    shape = encoder.expert if isinstance(encoder, SwitchEncoderConfig) else encoder
    return shape.gate if isinstance(shape, KroneckerEncoderConfig) else None


class SwitchEncoder(nn.Module):
    """``z = p_e(x) * expert_e(x)`` with ``p(x) = softmax(W_router x + b_router)`` and e the largest of p.

    The factor p_e gives the router its gradient. Latent ``f`` of expert e is latent ``e * F/E + f`` of the whole.
    """

    def __init__(self, config: SwitchEncoderConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.W_router = nn.Parameter(torch.empty(config.num_experts, d_in))
        self.b_router = nn.Parameter(torch.zeros(config.num_experts))
        self.experts = nn.ModuleList(config.expert.build(d_in) for _ in range(config.num_experts))

    @property
    def weight(self) -> Float[Tensor, "... D"]:
        """The experts' weights, one expert after another: a copy."""
        return torch.cat([expert.get_parameter("weight") for expert in self.experts])

    @property
    def bias(self) -> Float[Tensor, "..."]:
        """The experts' biases, one expert after another: a copy."""
        return torch.cat([expert.get_parameter("bias") for expert in self.experts])

    def forward(self, x_BD: Float[Tensor, "B D"]) -> SwitchLatents:
        return SwitchLatents(aligned(x_BD), self)

    @torch.no_grad()
    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Take raw x where ``(x - mean) / scale`` was taken, and give latents ``latent_scale`` times as large."""
        for expert in self.experts:
            expert.fold(mean_D, scale_D, latent_scale)  # type: ignore[operator]
        self.W_router.div_(scale_D)
        self.b_router.sub_(self.W_router @ mean_D)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Each expert as it starts alone, but scaled for the whole dictionary; the router ~ Normal(0, 1) / sqrt(D)."""
        for expert in self.experts:
            expert.initialize(generator)  # type: ignore[operator]
        if self.config.expert.init_norm is None:
            for expert in self.experts:
                expert.get_parameter("weight").mul_(self.config.num_experts**-0.5)
        self.W_router.copy_(torch.randn(self.W_router.shape, generator=generator) / math.sqrt(self.d_in))
        self.b_router.zero_()

    @torch.no_grad()
    def initial_decoder_rows(self) -> Float[Tensor, "F D"]:
        """The experts' rows, one expert after another."""
        return torch.cat([expert.initial_decoder_rows() for expert in self.experts])  # type: ignore[operator]


@dataclass(frozen=True)
class SwitchLatents:
    """The latents of a `SwitchEncoder`: tokens are grouped by expert, and each expert sees its own only."""

    x_BD: Tensor
    encoder: SwitchEncoder

    @property
    def num_tokens(self) -> int:
        return len(self.x_BD)

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        """As the experts choose, for requests per token; the codes are scaled by the router's probability."""
        choices = [request for request in requests if isinstance(request, Choice)]
        if len(choices) < len(requests):
            raise UserError("a switch encoder chooses per token only; use sparsifier 'topk'.")
        size = self.encoder.config.expert.d_sae
        order_B = self.expert_B.argsort(stable=True)
        groups = self.x_BD[order_B].split(self.tokens_E.tolist())
        parts: list[list[SparseCodes]] = [[] for _ in choices]
        for number, (expert, x_ND) in enumerate(zip(self.encoder.experts, groups, strict=True)):
            latents: DenseLatents | KroneckerLatents = expert(x_ND)
            own = [_own(choice, number * size, size) for choice in choices]
            found = iter(latents.choose(*(choice for choice in own if choice.k)))
            for choice, wanted, part in zip(own, choices, parts, strict=True):
                codes = next(found) if choice.k else _nothing(x_ND, size)
                part.append(_widen(codes, wanted.k, number * size, self.encoder.d_sae))
        back_B = order_B.argsort()
        probability_B1 = self.probability_BE.gather(1, self.expert_B.unsqueeze(1))
        return tuple(
            SparseCodes(
                torch.cat([codes.values for codes in part])[back_B] * probability_B1,
                torch.cat([codes.indices for codes in part])[back_B],
                self.encoder.d_sae,
            )
            for part in parts
        )

    def materialize(self) -> Float[Tensor, "B F"]:
        all_EBF = torch.stack([expert(self.x_BD).materialize() for expert in self.encoder.experts])
        picked_BE = torch.zeros_like(self.probability_BE).scatter(1, self.expert_B.unsqueeze(1), 1.0)
        return torch.einsum("ebf,be->bef", all_EBF, self.probability_BE * picked_BE).flatten(1)

    def penalty(self) -> Float[Tensor, ""] | None:
        """``weight * E * sum_e share_e * mean_b p_e(x_b)``, share_e being the part of the tokens sent to expert e.

        1 times the weight where both are even (Fedus et al. 2022; Mudide et al. 2025).
        """
        config = self.encoder.config
        if config.balance_weight == 0 or self.num_tokens == 0:
            return None
        share_E = self.tokens_E.to(self.x_BD.dtype) / self.num_tokens
        return config.balance_weight * config.num_experts * (share_E * self.probability_BE.mean(0)).sum()

    @cached_property
    def probability_BE(self) -> Float[Tensor, "B E"]:
        """The router's p."""
        return torch.addmm(self.encoder.b_router, self.x_BD, self.encoder.W_router.T).softmax(-1)

    @cached_property
    def expert_B(self) -> Int[Tensor, " B"]:
        """The expert of each token."""
        return self.probability_BE.argmax(-1)

    @cached_property
    def tokens_E(self) -> Int[Tensor, " E"]:
        """How many tokens each expert got."""
        return torch.bincount(self.expert_B, minlength=self.encoder.config.num_experts)


def _own(choice: Choice, start: int, size: int) -> Choice:
    """A choice among all latents as one expert has to answer it."""
    if choice.latents_C is None:
        return choice
    inside_C = choice.latents_C[(choice.latents_C >= start) & (choice.latents_C < start + size)] - start
    return Choice(min(choice.k, len(inside_C)), inside_C)


def _nothing(x_ND: Tensor, size: int) -> SparseCodes:
    return SparseCodes(x_ND.new_zeros(len(x_ND), 0), torch.zeros(len(x_ND), 0, dtype=torch.int64).to(x_ND.device), size)


def _widen(codes: SparseCodes, k: int, start: int, d_sae: int) -> SparseCodes:
    """An expert's codes as those of the whole dictionary, padded to k columns."""
    missing = (0, k - codes.values.shape[1])
    values = nn.functional.pad(codes.values, missing)
    return SparseCodes(values, nn.functional.pad(codes.indices, missing) + start, d_sae)
