"""Sparsifiers select the active latents. The selection may differ between training and inference."""

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
from kronsae.core.shares import share_of_mean, shares
from kronsae.kernels import Above, BatchChoice, Choice
from kronsae.support.errors import UserError


class Chosen(NamedTuple):
    """Result of a selection in training: the codes, one more for each extra request, and l0 if a loss uses it."""

    codes: SparseCodes
    also: tuple[SparseCodes, ...]
    l0: Float[Tensor, ""] | None = None


@runtime_checkable
class Sparsifier(Protocol):
    """Interface that `SAE` requires of its sparsifier."""

    def __call__(self, latents: Latents) -> SparseCodes:
        """Return the codes at inference; those of a token depend on this token alone."""
        ...

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        """Return the codes of a training batch, and one more for each choice in ``also``; all share one product.

        The selection may depend on the whole batch and may update the sparsifier's state.
        """
        ...

    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Adapt to latents that become ``scale`` times as large."""
        ...

    def trained(self) -> Sparsifier:
        """Return the sparsifier to save when training ends."""
        ...


@runtime_checkable
class _EncoderShape(Protocol):
    """Attributes of an encoder config that a sparsifier config checks."""

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

    def check(self, encoder: _EncoderShape) -> None:
        """Raise if the encoder has fewer than k latents per token."""
        _check_k(self.k, encoder)

    def build(self, d_sae: int) -> TopK:
        """Return the sparsifier."""
        return TopK(self)


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig:
    """Keep the B * k largest latents of a batch of B tokens (Bussmann et al. 2024); saved as a `JumpReLU`.

    Args:
        k: latents per token, on average.
        threshold_decay: decay per step of the running mean of the threshold.
    """

    kind: ClassVar[str] = "batch_topk"
    k: int
    threshold_decay: float = 0.95

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if not 0 <= self.threshold_decay < 1:
            raise UserError(f"threshold_decay must be in [0, 1); got {self.threshold_decay!r}.")

    def check(self, encoder: _EncoderShape) -> None:
        """Raise if the encoder has fewer than k latents per token, or has experts: their tokens share no batch."""
        _check_k(self.k, encoder)
        _check_no_experts(self.kind, encoder)

    def build(self, d_sae: int) -> BatchTopK:
        """Return the sparsifier."""
        return BatchTopK(self, d_sae)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    """Keep every latent above its own threshold (Rajamanoharan et al. 2024b).

    Args:
        k: l0, latents per token on average: the l0 at the start of training, and its target unless another is given.
        bandwidth: width of the estimator's rectangular kernel, as a share of the threshold.
    """

    kind: ClassVar[str] = "jumprelu"
    k: int
    bandwidth: float = 0.5

    def __post_init__(self) -> None:
        check_count("k", self.k)
        if not 0 < self.bandwidth < 2:
            raise UserError(f"bandwidth must be between 0 and 2; got {self.bandwidth!r}.")

    def check(self, encoder: _EncoderShape) -> None:
        """Raise if the encoder has fewer than k latents per token, or has experts: their router scales the latents."""
        _check_k(self.k, encoder)
        _check_no_experts(self.kind, encoder)

    def build(self, d_sae: int) -> JumpReLU:
        """Return the sparsifier; before its first training batch it keeps every positive latent."""
        return JumpReLU(self, d_sae)


SparsifierConfig = TopKConfig | BatchTopKConfig | JumpReLUConfig


class TopK(nn.Module):
    """``f = TopK(z)``, exact and per token. If fewer than k latents are positive, fewer than k are active."""

    def __init__(self, config: TopKConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: Latents) -> SparseCodes:
        return latents.choose(Choice(self.config.k))[0]

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        codes, *rest = latents.choose(Choice(self.config.k), *also)
        return Chosen(codes, tuple(rest))

    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Do nothing: the k largest latents do not depend on their scale."""

    def trained(self) -> TopK:
        return self


class BatchTopK(nn.Module):
    """Keeps the B * k largest latents of the batch, exactly; at inference, every latent above the learned threshold.

    ``log_threshold [1]`` is the running mean over steps of the logarithm of the smallest kept activation, with decay
    `threshold_decay` per step. The first batch sets it. Before that it is minus infinity: every positive latent is
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
        tokens = shares().tokens(latents.num_tokens)
        codes, *rest = latents.choose(BatchChoice(tokens * self.config.k), *also)
        self._learn(codes)
        return Chosen(codes, tuple(rest))

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Adapt to latents that become ``scale`` times as large."""
        self.log_threshold.add_(scale.log())

    def trained(self) -> JumpReLU:
        """Return a `JumpReLU` with the learned threshold for every latent."""
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

    The first training batch sets all thresholds to one value, at which its l0 is ``k``. From then on they learn with
    the straight-through estimator of `jump`. Latents below their threshold but inside the estimator's kernel are
    computed too; in the codes they are padding.
    """

    def __init__(self, config: JumpReLUConfig, d_sae: int) -> None:
        super().__init__()
        self.config, self.d_sae = config, d_sae
        self.log_threshold = nn.Parameter(torch.full((d_sae,), -torch.inf))

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """Threshold of each latent."""
        return self.log_threshold.exp()

    def forward(self, latents: Latents) -> SparseCodes:
        return latents.choose(Above(self.threshold.detach()))[0]

    def choose_in_training(self, latents: Latents, *also: Choice) -> Chosen:
        self._start(latents)
        reach = self.threshold.detach() * (1 - self.config.bandwidth / 2)
        near, *rest = latents.choose(Above(reach), *also)
        # index_select sums its gradient in a fixed order; indexing with [...] does not when several threads run
        log_threshold_BK = self.log_threshold.index_select(0, near.indices.flatten()).view_as(near.values)
        values_BK, on_BK = jump(near.values, log_threshold_BK, self.config.bandwidth)
        return Chosen(SparseCodes(values_BK, near.indices, near.d_sae), tuple(rest), share_of_mean(on_BK.sum(-1)))

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, ""]) -> None:
        """Adapt to latents that become ``scale`` times as large."""
        self.log_threshold.add_(scale.log())

    def trained(self) -> JumpReLU:
        return self

    @torch.no_grad()
    def _start(self, latents: Latents) -> None:
        if self.log_threshold[0] > -torch.inf:
            return
        tokens = shares().tokens(latents.num_tokens)
        smallest = smallest_active(latents.choose(BatchChoice(tokens * self.config.k))[0])
        if smallest is not None:
            self.log_threshold.fill_(smallest.log().item())


def smallest_active(codes: SparseCodes) -> Float[Tensor, ""] | None:
    """Return the smallest activation above 0 of the batch; None if nothing is active."""
    values_N = codes.values.detach()[codes.active]
    smallest = shares().smallest(values_N.min() if len(values_N) else codes.values.new_tensor(torch.inf))
    return None if smallest == torch.inf else smallest


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
    """Return ``z * H(z - theta)`` and ``H(z - theta)`` with a straight-through gradient.

    ``theta = exp(log_threshold)``. The kernel is the rectangle ``K(t) = 1 if |t| < 1/2 else 0`` of width ``eps``, as in
    Rajamanoharan et al. (2024b, eq. 11): ``d(z H)/d theta = -theta/eps K((z - theta)/eps)`` and
    ``dH/d theta = -1/eps K((z - theta)/eps)``. The derivatives with respect to z are ``H`` and 0. Our
    choice is ``eps = bandwidth * theta``, because the scale of activations differs between language models. The
    derivatives with respect to ``log_threshold`` are then ``-theta/bandwidth K`` and ``-1/bandwidth K``.
    """
    values, on = _Jump.apply(z, log_threshold, bandwidth)
    return values, on


def _check_k(k: int, encoder: _EncoderShape) -> None:
    if k > encoder.latents_per_token:
        whose = "d_sae" if encoder.latents_per_token == encoder.d_sae else "the latents of one expert"
        raise UserError(
            f"k must be at most {whose}; got k={k} with {whose}={encoder.latents_per_token}. Lower k or widen."
        )


def _check_no_experts(kind: str, encoder: _EncoderShape) -> None:
    if encoder.kind == "switch":
        raise UserError(f"sparsifier must be 'topk' with a switch encoder; got '{kind}'.")
