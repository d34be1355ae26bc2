"""Switch encoder: a router sends each token to one of E smaller encoders, the experts (Mudide et al. 2025)."""

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
    OwnEncoderConfig,
    restricted,
)
from kronsae.core.gates import GateName
from kronsae.core.shares import share_of_mean, shares
from kronsae.core.trunk import TrunkEncoderConfig
from kronsae.kernels import Choice, Request
from kronsae.support.errors import UserError
from kronsae.support.tensors import aligned

MAX_EXPERTS = 4096
"""Upper limit of experts: each is a module with its own weights and product. Mudide et al. use at most 128."""


@dataclass(frozen=True, kw_only=True)
class SwitchEncoderConfig:
    """Config of E experts of equal shape; the dictionary holds their latents expert by expert.

    Args:
        num_experts: E, at most `MAX_EXPERTS`.
        expert: config of one expert; the total ``d_sae`` is ``num_experts * expert.d_sae``.
        balance_weight: coefficient of the load-balancing loss (Mudide et al.: 3).
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
        """F, the number of latents of all experts."""
        return self.num_experts * self.expert.d_sae

    @property
    def block(self) -> int:
        """Smallest number of latents that a group boundary may not split: one expert's."""
        return self.expert.d_sae

    @property
    def latents_per_token(self) -> int:
        """Largest number of latents that one token can activate: those of one expert."""
        return self.expert.d_sae

    def build(self, d_in: int) -> SwitchEncoder:
        """Return the encoder for inputs of width ``d_in``, not yet initialised."""
        return SwitchEncoder(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass: ``D * E`` for the router, plus those of one expert."""
        return d_in * self.num_experts + self.expert.multiply_adds(d_in)


AnyEncoderConfig = EncoderConfig | TrunkEncoderConfig | SwitchEncoderConfig | OwnEncoderConfig


def gate_of(encoder: AnyEncoderConfig) -> GateName | None:
    """Return the gate of an encoder, of its heads or of a switch encoder's experts; None if nothing is composed."""
    shape: AnyEncoderConfig = encoder
    if isinstance(encoder, SwitchEncoderConfig):
        shape = encoder.expert
    elif isinstance(encoder, TrunkEncoderConfig):
        shape = encoder.heads
    return shape.gate if isinstance(shape, KroneckerEncoderConfig) else None


class SwitchEncoder(nn.Module):
    """``z = p_e(x) * expert_e(x)`` with ``p(x) = softmax(W_router x + b_router)`` and ``e = argmax p(x)``.

    The factor p_e passes a gradient to the router. Latent ``f`` of expert e has index ``e * F/E + f``.
    """

    def __init__(self, config: SwitchEncoderConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.W_router = nn.Parameter(torch.empty(config.num_experts, d_in))
        self.b_router = nn.Parameter(torch.zeros(config.num_experts))
        self.experts = nn.ModuleList(config.expert.build(d_in) for _ in range(config.num_experts))

    @property
    def weight(self) -> Float[Tensor, "... D"]:
        """Weights of the experts, concatenated expert by expert: a copy."""
        return torch.cat([expert.get_parameter("weight") for expert in self.experts])

    @property
    def bias(self) -> Float[Tensor, "..."]:
        """Biases of the experts, concatenated expert by expert: a copy."""
        return torch.cat([expert.get_parameter("bias") for expert in self.experts])

    def forward(self, x_BD: Float[Tensor, "B D"]) -> SwitchLatents:
        return SwitchLatents(aligned(x_BD), self)

    @torch.no_grad()
    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights for raw x instead of ``(x - mean) / scale``, with latents scaled by ``latent_scale``."""
        for expert in self.experts:
            expert.fold(mean_D, scale_D, latent_scale)  # type: ignore[operator]
        self.W_router.div_(scale_D)
        self.b_router.sub_(self.W_router @ mean_D)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialise each expert with the scale of the whole dictionary, and the router with Normal(0, 1) / sqrt(D)."""
        for expert in self.experts:
            expert.initialize(generator)  # type: ignore[operator]
        if self.config.expert.init_norm is None:
            for expert in self.experts:
                expert.get_parameter("weight").mul_(self.config.num_experts**-0.5)
        self.W_router.copy_(torch.randn(self.W_router.shape, generator=generator) / math.sqrt(self.d_in))
        self.b_router.zero_()

    @torch.no_grad()
    def initial_decoder_rows(self) -> Float[Tensor, "F D"]:
        """Return the experts' decoder rows, concatenated expert by expert."""
        return torch.cat([expert.initial_decoder_rows() for expert in self.experts])  # type: ignore[operator]


@dataclass(frozen=True)
class SwitchLatents:
    """Latents of a `SwitchEncoder`: tokens are grouped by expert, and each expert sees only its own tokens."""

    x_BD: Tensor
    encoder: SwitchEncoder

    @property
    def num_tokens(self) -> int:
        return len(self.x_BD)

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        """Return the experts' codes, scaled by the router's probability; only requests per token are supported."""
        choices = [request for request in requests if isinstance(request, Choice)]
        if len(choices) < len(requests):
            raise UserError("sparsifier must select per token with a switch encoder. Use sparsifier 'topk'.")
        size = self.encoder.config.expert.d_sae
        order_B = self.expert_B.argsort(stable=True)
        groups = self.x_BD[order_B].split(self.tokens_E.tolist())
        parts: list[list[SparseCodes]] = [[] for _ in choices]
        for number, (expert, x_ND) in enumerate(zip(self.encoder.experts, groups, strict=True)):
            latents: DenseLatents | KroneckerLatents = expert(x_ND)
            own = [restricted(choice, number * size, size) for choice in choices]
            found = iter(latents.choose(*(choice for choice in own if choice.k)))
            for choice, wanted, part in zip(own, choices, parts, strict=True):
                codes = next(found) if choice.k else _empty_codes(x_ND, size)
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
        """Load-balancing loss ``weight * E * sum_e share_e * mean_b p_e(x_b)``.

        share_e is the share of tokens sent to expert e. The loss equals ``weight`` if share and mean p_e are uniform
        (Fedus et al. 2022; Mudide et al. 2025).
        """
        config = self.encoder.config
        tokens = shares().tokens(self.num_tokens)
        if config.balance_weight == 0 or tokens == 0:
            return None
        share_E = shares().sum(self.tokens_E).to(self.x_BD.dtype) / tokens
        return config.balance_weight * config.num_experts * (share_E * share_of_mean(self.probability_BE)).sum()

    @cached_property
    def probability_BE(self) -> Float[Tensor, "B E"]:
        """Router probabilities p(x)."""
        return torch.addmm(self.encoder.b_router, self.x_BD, self.encoder.W_router.T).softmax(-1)

    @cached_property
    def expert_B(self) -> Int[Tensor, " B"]:
        """Index of each token's expert."""
        return self.probability_BE.argmax(-1)

    @cached_property
    def tokens_E(self) -> Int[Tensor, " E"]:
        """Number of tokens sent to each expert."""
        return torch.bincount(self.expert_B, minlength=self.encoder.config.num_experts)


def _empty_codes(x_ND: Tensor, size: int) -> SparseCodes:
    return SparseCodes(x_ND.new_zeros(len(x_ND), 0), torch.zeros(len(x_ND), 0, dtype=torch.int64).to(x_ND.device), size)


def _widen(codes: SparseCodes, k: int, start: int, d_sae: int) -> SparseCodes:
    """Map the codes of one expert to indices of the whole dictionary and pad them to k columns."""
    missing = (0, k - codes.values.shape[1])
    values = nn.functional.pad(codes.values, missing)
    return SparseCodes(values, nn.functional.pad(codes.indices, missing) + start, d_sae)
