"""Encoders, starts and second passes that `pursuit_ideas` compares; in plain PyTorch, and not part of the library.

- `TrunkConfig`: some latents have rows of their own, the others are cells of Kronecker heads.
- `WhitenedConfig`: the encoder's weights are learned in whitened coordinates.
- `exclusive_grids`: heads start as grids of latents that a dense encoder seldom activates together.
- `SecondPass`: the encoder looks again at what its first codes leave unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import (
    DenseEncoderConfig,
    Encoder,
    EncoderConfig,
    KroneckerEncoder,
    KroneckerEncoderConfig,
    Latents,
)
from kronsae.core.pursuit import Pursuit, pursue
from kronsae.core.registration import register_encoder
from kronsae.kernels import Choice
from kronsae.training.member import Member


@register_encoder
@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Config of ``dense`` latents with rows of their own, followed by those of Kronecker heads."""

    kind: ClassVar[str] = "research_trunk"
    block: ClassVar[int] = 1
    dense: int
    num_heads: int
    d_base: int
    d_extension: int
    init_norm: float | None = None

    @property
    def d_sae(self) -> int:
        """F."""
        return self.dense + self.num_heads * self.d_base * self.d_extension

    @property
    def latents_per_token(self) -> int:
        """F."""
        return self.d_sae

    def build(self, d_in: int) -> Trunk:
        """Return the encoder."""
        return Trunk(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token."""
        return sum(part.multiply_adds(d_in) for part in self.parts)

    @property
    def parts(self) -> tuple[EncoderConfig, ...]:
        """Configs of the two parts."""
        heads = {"num_heads": self.num_heads, "d_base": self.d_base, "d_extension": self.d_extension}
        return (
            DenseEncoderConfig(d_sae=self.dense, init_norm=self.init_norm),
            KroneckerEncoderConfig(**heads, init_norm=self.init_norm),
        )


class Trunk(nn.Module):
    """Union of two encoders; the latents of the first come first."""

    def __init__(self, config: TrunkConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.parts = nn.ModuleList(part.build(d_in) for part in config.parts)

    def forward(self, x_BD: Tensor) -> UnionLatents:
        return UnionLatents([part(x_BD) for part in self.parts], [part.d_sae for part in self.config.parts])

    def initialize(self, generator: torch.Generator) -> None:
        for part in self.parts:
            part.initialize(generator)

    def initial_decoder_rows(self) -> Tensor:
        return torch.cat([part.initial_decoder_rows() for part in self.parts])


@dataclass(frozen=True)
class UnionLatents:
    """Latents of several encoders: the k largest of all are among the k largest of each."""

    parts: list[Latents]
    sizes: list[int]

    @property
    def num_tokens(self) -> int:
        return self.parts[0].num_tokens

    def choose(self, *requests: Choice) -> tuple[SparseCodes, ...]:
        return tuple(self._best(request) for request in requests)

    def materialize(self) -> Tensor:
        return torch.cat([part.materialize() for part in self.parts], dim=1)

    def penalty(self) -> None:
        return None

    def _best(self, request: Choice) -> SparseCodes:
        found: list[SparseCodes] = []
        first = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            latents_C = request.latents_C
            if latents_C is not None:
                latents_C = latents_C[(latents_C >= first) & (latents_C < first + size)] - first
            most = size if latents_C is None else len(latents_C)
            if most:
                (codes,) = part.choose(Choice(min(request.k, most), latents_C))
                found.append(SparseCodes(codes.values, codes.indices + first, sum(self.sizes)))
            first += size
        values_BX = torch.cat([codes.values for codes in found], dim=1)
        indices_BX = torch.cat([codes.indices for codes in found], dim=1)
        kept_BK = values_BX.detach().topk(min(request.k, values_BX.shape[1]), dim=1).indices
        return SparseCodes(values_BX.gather(1, kept_BK), indices_BX.gather(1, kept_BK), sum(self.sizes))


@register_encoder
@dataclass(frozen=True, kw_only=True)
class WhitenedConfig:
    """Config of an encoder that reads ``A x`` with ``A`` proportional to ``(Sigma + eps)^(-1/2)``, a constant."""

    kind: ClassVar[str] = "research_whitened"
    block: ClassVar[int] = 1
    inner: EncoderConfig

    @property
    def d_sae(self) -> int:
        """F."""
        return self.inner.d_sae

    @property
    def latents_per_token(self) -> int:
        """F."""
        return self.inner.latents_per_token

    def build(self, d_in: int) -> Whitened:
        """Return the encoder."""
        return Whitened(self, d_in)

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token; ``A`` is folded into the rows after training."""
        return self.inner.multiply_adds(d_in)


class Whitened(nn.Module):
    """The function of the inner encoder, learned in other coordinates; only Adam's geometry differs."""

    A_DD: Tensor

    def __init__(self, config: WhitenedConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.inner = config.inner.build(d_in)
        self.register_buffer("A_DD", torch.eye(d_in))

    def forward(self, x_BD: Tensor) -> Latents:
        latents: Latents = self.inner(x_BD @ self.A_DD)
        return latents

    def initialize(self, generator: torch.Generator) -> None:
        self.inner.initialize(generator)

    @torch.no_grad()
    def initial_decoder_rows(self) -> Tensor:
        return self.inner.initial_decoder_rows() @ self.A_DD


@torch.no_grad()
def whiten(member: Member, x_ND: Tensor, eps: float = 0.01) -> None:
    """Set ``A`` from normalised activations, and the inner rows so that the encoder's function is what it was."""
    encoder = member.sae.encoder
    assert isinstance(encoder, Whitened)
    covariance = torch.cov(x_ND.T.double())
    eigenvalues, vectors = torch.linalg.eigh(covariance + eps * covariance.diagonal().mean() * torch.eye(encoder.d_in))
    A = vectors @ torch.diag(eigenvalues**-0.5) @ vectors.T
    A *= (covariance.trace() / (A @ covariance @ A).trace()).sqrt()
    encoder.A_DD.copy_(A)
    weight = encoder.inner.weight
    weight.copy_(weight.double() @ torch.linalg.inv(A))


class SecondPass(nn.Module):
    """Codes of ``x + eta e``, with ``e`` what the k best latents of the first pass leave unexplained.

    Args:
        encoder: the encoder, for the second pass.
        eta: weight of the residual.
        pursuit: a pursuit among the candidates of the second pass; None: the k best are taken as they are.
    """

    candidates, changes_nothing = 1, False

    def __init__(self, encoder: Encoder, eta: float, pursuit: Pursuit | None = None) -> None:
        super().__init__()
        self.eta, self.pursuit = eta, pursuit
        self.encoder = [encoder]  # in a list: its parameters are the SAE's

    def codes(self, x_BD: Tensor, proposed: SparseCodes, decoder: Decoder, k: int) -> SparseCodes:
        """Return the codes of x, given the encoder's k best."""
        own_BD = kernels.decode(proposed.values, proposed.indices, decoder.W_dec, decoder.b_dec)
        latents = self.encoder[0](x_BD + self.eta * (x_BD - own_BD))
        (again,) = latents.choose(Choice(k if self.pursuit is None else self.pursuit.proposed(k)))
        if self.pursuit is None:
            return again
        return pursue(self.pursuit, x_BD, again, decoder, k)


@torch.no_grad()
def exclusive_grids(
    member: Member, dense: Member, x_ND: Tensor, *, exclusive: bool = True, likeness: float = 0.0, seed: int = 0
) -> None:
    """Start the heads of a KronSAE as grids of the latents of a dense SAE.

    Latents are assigned to heads from the most frequent on. Each head takes those that were least often active together
    with its own, relative to independence, minus ``likeness`` times the mean cosine of their rows. Of 200 arrangements
    of a head's latents on its grid, the one of least two-way additive residual is taken. Base i is the sum of the dense
    rows of its grid row, extension j that of its grid column; the decoder takes the dense decoder's rows.

    Args:
        member: the KronSAE.
        dense: a dense SAE of as many latents, trained before.
        x_ND: normalised activations.
        exclusive: False: latents are assigned at random.
        likeness: weight of the cosine.
        seed: of random arrangements.
    """
    encoder, teacher = member.sae.encoder, dense.sae
    assert isinstance(encoder, KroneckerEncoder)
    m, n, heads = encoder.d_base, encoder.d_extension, encoder.num_heads
    generator = torch.Generator().manual_seed(seed)
    codes = teacher.encode(x_ND)
    active_NF = torch.zeros(len(x_ND), teacher.d_sae).scatter_(1, codes.indices, codes.active.float())
    rate_F = active_NF.mean(0)
    together_FF = (active_NF.T @ active_NF / len(x_ND)) / (rate_F[:, None] * rate_F[None, :]).clamp_min(1e-9)
    rows_FD, bias_F = teacher.encoder.weight, teacher.encoder.bias
    unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True)
    cost_FF = together_FF.clamp_max(20.0) - likeness * (unit_FD @ unit_FD.T)
    order_F = rate_F.argsort(descending=True) if exclusive else torch.randperm(len(rate_F), generator=generator)
    for head, latents in enumerate(_heads(order_F.tolist(), cost_FF, heads, m * n, greedy=exclusive)):
        grid = _arranged(rows_FD[latents], m, n, generator)
        own = torch.tensor(latents)[grid]
        encoder.weight[head, :m] = rows_FD[own].sum(1)
        encoder.weight[head, m:] = rows_FD[own].sum(0)
        encoder.bias[head, :m] = bias_F[own].mean(1)
        encoder.bias[head, m:] = bias_F[own].mean(0)
        member.sae.decoder.W_dec[head * m * n : (head + 1) * m * n] = teacher.W_dec[own.flatten()]
    member.sae.decoder.b_dec.copy_(teacher.decoder.b_dec)


def _heads(order: Sequence[int], cost_FF: Tensor, heads: int, size: int, *, greedy: bool) -> list[list[int]]:
    """Return the latents of each head: heads are seeded in order, then take turns to add their cheapest latent."""
    if not greedy:
        return [list(order[head * size : (head + 1) * size]) for head in range(heads)]
    found = [[seed] for seed in order[:heads]]
    total_HF = cost_FF[list(order[:heads])].clone()
    total_HF[:, list(order[:heads])] = torch.inf
    for _ in range(size - 1):
        for head in range(heads):
            chosen = int(total_HF[head].argmin())
            found[head].append(chosen)
            total_HF[head] += cost_FF[chosen]
            total_HF[:, chosen] = torch.inf
    return found


def _arranged(rows_LD: Tensor, m: int, n: int, generator: torch.Generator) -> Tensor:
    """Return the arrangement ``[M, N]`` of L = M N rows of least two-way additive residual, of 200 random ones."""
    grids = torch.stack([torch.randperm(m * n, generator=generator) for _ in range(200)]).view(-1, m, n)
    gram_LL = rows_LD @ rows_LD.T

    def squared_means(within: Tensor) -> Tensor:  # |mean of the rows in each group|^2, summed over groups
        size = within.shape[-1]
        return gram_LL[within.unsqueeze(-1), within.unsqueeze(-2)].sum((-1, -2, -3)) / size**2

    explained = n * squared_means(grids) + m * squared_means(grids.transpose(1, 2))
    return grids[explained.argmax()]
