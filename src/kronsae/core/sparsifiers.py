"""Sparsifiers choose which latents stay: always the same way in use, perhaps another way in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import Latents
from kronsae.kernels import Above, BatchChoice, Choice
from kronsae.support.errors import UserError


class Chosen(NamedTuple):
    """What a sparsifier chooses in training: its codes, the codes also asked for, and l0 where it learns from it."""

    codes: SparseCodes
    also: tuple[SparseCodes, ...]
    l0: Float[Tensor, ""] | None = None


@runtime_checkable
class Sparsifier(Protocol):
    """What an `SAE` needs of its sparsifier."""

    def __call__(self, latents: Latents) -> SparseCodes:
        """The codes of a trained SAE: each token's depend on this token alone."""
        ...

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        """The codes of one batch of training, and one more for each choice in ``also``, at the price of one product.

        May look at the whole batch and take note of it.
        """
        ...

    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Expect latents ``scale`` times as large."""
        ...

    def trained(self) -> Sparsifier:
        """What remains of it once training ends: this is what is saved."""
        ...


@runtime_checkable
class _Shape(Protocol):
    """What a sparsifier's config asks of the encoder's."""

    @property
    def kind(self) -> str: ...

    @property
    def d_sae(self) -> int: ...

    @property
    def latents_per_token(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """Keep the k largest latents of each token (Gao et al. 2025)."""

    kind: ClassVar[str] = "topk"
    k: int

    def __post_init__(self) -> None:
        check_count("k", self.k)

    def check(self, encoder: _Shape) -> None:
        """Refuse a k that the encoder cannot give."""
        _check_k(self.k, encoder)

    def build(self, d_sae: int) -> TopK:
        """The sparsifier."""
        return TopK(self)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig:
    """Keep the B * k largest latents of a batch of B tokens (Bussmann et al. 2024); saved as a `JumpReLU`.

    Args:
        k: latents per token, on average.
        threshold_decay: of the running mean of the threshold, per step.
    """

    kind: ClassVar[str] = "batch_topk"
    k: int
    threshold_decay: float = 0.95

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if not 0 <= self.threshold_decay < 1:
            raise UserError(f"threshold_decay must be in [0, 1); got {self.threshold_decay!r}.")

    def check(self, encoder: _Shape) -> None:
        """Refuse a k that the encoder cannot give, and experts, whose tokens share no batch."""
        _check_k(self.k, encoder)
        _check_no_experts(self.kind, encoder)

    def build(self, d_sae: int) -> BatchTopK:
        """The sparsifier."""
        return BatchTopK(self, d_sae)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    """Keep every latent above a threshold of its own (Rajamanoharan et al. 2024b).

    Args:
        k: l0, latents per token on average: what training starts with and, unless told otherwise, aims at.
        bandwidth: width of the estimator's rectangle, as a share of the threshold.
    """

    kind: ClassVar[str] = "jumprelu"
    k: int
    bandwidth: float = 0.5

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if not 0 < self.bandwidth < 2:
            raise UserError(f"bandwidth must be between 0 and 2; got {self.bandwidth!r}.")

    def check(self, encoder: _Shape) -> None:
        """Refuse a k that the encoder cannot give, and experts, whose router scales the latents."""
        _check_k(self.k, encoder)
        _check_no_experts(self.kind, encoder)

    def build(self, d_sae: int) -> JumpReLU:
        """The sparsifier; it keeps every positive latent until it has seen a batch of training."""
        return JumpReLU(self, d_sae)


SparsifierConfig = TopKConfig | BatchTopKConfig | JumpReLUConfig


class TopK(nn.Module):
    """``f = TopK(z)``: exact, per token; fewer than k are active where fewer than k latents are positive."""

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: Latents) -> SparseCodes:
        return latents.choose(Choice(self.config.k))[0]

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        codes, *rest = latents.choose(Choice(self.config.k), *also)
        return Chosen(codes, tuple(rest))

    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Expect latents ``scale`` times as large."""

    def trained(self) -> TopK:
        return self


class BatchTopK(nn.Module):
    """The B * k largest latents of the batch, exactly; in use, every latent above the learned threshold.

    ``log_threshold [1]`` is the running mean, over steps, of the logarithm of the smallest activation kept
    (`threshold_decay` per step; the first batch sets it). Minus infinity before the first: every positive latent is
    kept.
    """

    log_threshold: Tensor

    def __init__(self, config: BatchTopKConfig, d_sae: int) -> None:
        super().__init__()
        self.config, self.d_sae = config, d_sae
        self.register_buffer("log_threshold", torch.full((1,), -torch.inf))

    def forward(self, latents: Latents) -> SparseCodes:
        return latents.choose(Above(self.log_threshold.exp().expand(self.d_sae)))[0]

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        tokens = latents.num_tokens
        codes, *rest = latents.choose(BatchChoice(tokens * self.config.k), *also)
        self._learn(codes)
        return Chosen(codes, tuple(rest))

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Expect latents ``scale`` times as large."""
        self.log_threshold.add_(scale.log())

    def trained(self) -> JumpReLU:
        """A `JumpReLU` whose thresholds are all the learned one."""
        sparsifier = JumpReLU(JumpReLUConfig(k=self.config.k), self.d_sae).to(self.log_threshold)
        with torch.no_grad():
            sparsifier.log_threshold.copy_(self.log_threshold.expand(self.d_sae))
        return sparsifier

    @torch.no_grad()
    def _learn(self, codes: SparseCodes) -> None:
        smallest = smallest_active(codes)
        if smallest is not None:
            weight = 1.0 if self.log_threshold.isinf() else 1 - self.config.threshold_decay
            now = smallest.log()
            self.log_threshold.copy_(now if weight == 1.0 else self.log_threshold.lerp(now, weight))


class JumpReLU(nn.Module):
    """``f = z`` where ``z > theta``, else 0, with a learned threshold ``theta = exp(log_threshold)`` per latent.

    In training the thresholds start, all equal, where the first batch has an l0 of ``k``; from then on they learn by
    the straight-through estimator of `jump`. Latents below their threshold but within the estimator's rectangle are
    computed too, and count as padding in the codes.
    """

    def __init__(self, config: JumpReLUConfig, d_sae: int) -> None:
        super().__init__()
        self.config, self.d_sae = config, d_sae
        self.log_threshold = nn.Parameter(torch.full((d_sae,), -torch.inf))

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """Each latent's threshold."""
        return self.log_threshold.exp()

    def forward(self, latents: Latents) -> SparseCodes:
        return latents.choose(Above(self.threshold.detach()))[0]

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        self._start(latents)
        reach = self.threshold.detach() * (1 - self.config.bandwidth / 2)
        near, *rest = latents.choose(Above(reach), *also)
        # index_select: its gradient is a sum in a fixed order; that of [...] is not, on several threads
        log_threshold_BK = self.log_threshold.index_select(0, near.indices.flatten()).view_as(near.values)
        values_BK, on_BK = jump(near.values, log_threshold_BK, self.config.bandwidth)
        return Chosen(SparseCodes(values_BK, near.indices, near.d_sae), tuple(rest), on_BK.sum(-1).mean())

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Expect latents ``scale`` times as large."""
        self.log_threshold.add_(scale.log())

    def trained(self) -> JumpReLU:
        return self

    @torch.no_grad()
    def _start(self, latents: Latents) -> None:
        if self.log_threshold[0] > -torch.inf:
            return
        smallest = smallest_active(latents.choose(BatchChoice(latents.num_tokens * self.config.k))[0])
        if smallest is not None:
            self.log_threshold.fill_(smallest.log().item())


def smallest_active(codes: SparseCodes) -> Float[Tensor, ""] | None:
    """The smallest activation above 0; None where nothing is active."""
    values_N = codes.values.detach()[codes.active]
    return values_N.min() if len(values_N) else None


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, log_threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        threshold = log_threshold.exp()
        on: Bool[Tensor, "..."] = z > threshold
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(on, z, 0.0), on.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_on: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < threshold * ctx.bandwidth / 2
        grad_threshold = torch.where(near, -(threshold * grad_values + grad_on) / ctx.bandwidth, 0.0)
        return torch.where(z > threshold, grad_values, 0.0), grad_threshold, None


def jump(
    z: Float[Tensor, "..."], log_threshold: Float[Tensor, "..."], bandwidth: float
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """``z * H(z - theta)`` and ``H(z - theta)`` with ``theta = exp(log_threshold)``, by a straight-through estimator.

    With the rectangle ``K(t) = 1 if |t| < 1/2 else 0`` of width ``eps``, as in Rajamanoharan et al. (2024b, eq. 11):
    ``d(z H)/d theta = -theta/eps K((z - theta)/eps)`` and ``dH/d theta = -1/eps K((z - theta)/eps)``; with respect to
    z, ``H`` and 0. Ours: ``eps = bandwidth * theta``, since activations of language models come in every scale; then
    the derivatives by ``log_threshold`` are ``-theta/bandwidth K`` and ``-1/bandwidth K``.
    """
    values, on = _Jump.apply(z, log_threshold, bandwidth)
    return values, on


def _check_k(k: int, encoder: _Shape) -> None:
    if k > encoder.latents_per_token:
        whose = "d_sae" if encoder.latents_per_token == encoder.d_sae else "the latents of one expert"
        raise UserError(
            f"k must be at most {whose}; got k={k} with {whose}={encoder.latents_per_token}. Lower k or widen."
        )


def _check_no_experts(kind: str, encoder: _Shape) -> None:
    if encoder.kind == "switch":
        raise UserError(f"a switch encoder goes with sparsifier 'topk' only; got '{kind}'.")
