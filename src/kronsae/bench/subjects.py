"""Contestants of the benchmarks: one class each, with a ``step()`` that runs a whole training step.

A step is forward, backward, optimiser, and normalisation of the decoder rows, on a batch ``x [B, D]`` in memory.
Other libraries get PyTorch's fused AdamW, the fastest one for dense gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.sparsifiers import SparsifierConfig, TopKConfig
from kronsae.support.errors import UserError
from kronsae.training.config import MemberConfig, OptimizerConfig
from kronsae.training.member import Member

LR = 8e-4  # as in the paper
Place = torch.device | str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one comparison; every contestant has ``d_sae = H * M * N`` latents."""

    d_in: int = 768
    num_heads: int = 1024
    d_base: int = 4
    d_extension: int = 8
    k: int = 32
    batch: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1; got {value}.")
        if self.k > self.d_sae:
            raise UserError(f"k must be at most num_heads * d_base * d_extension = {self.d_sae}; got {self.k}.")

    @property
    def d_sae(self) -> int:
        """F, number of latents."""
        return self.num_heads * self.d_base * self.d_extension

    @property
    def pre_latents(self) -> int:
        """H * (M + N), number of outputs of the encoder's product."""
        return self.num_heads * (self.d_base + self.d_extension)


class Subject(Protocol):
    """A contestant, built for one shape."""

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        """Run one whole training step."""
        ...


class EncoderProduct:
    """The product ``x W^T`` of the Kronecker encoder alone: a lower bound on the cost of every step."""

    def __init__(self, shape: Shape, device: Place = "cpu") -> None:
        self.weight = torch.randn(shape.pre_latents, shape.d_in, device=device)

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        torch.mm(x_BD, self.weight.T)


class OwnTrainer:
    """The step of `kronsae train` without clipping and normalisation, which the other libraries do not do."""

    def __init__(
        self,
        shape: Shape,
        encoder: EncoderConfig,
        sparsifier: SparsifierConfig | None = None,
        device: Place = "cpu",
    ) -> None:
        config = MemberConfig(
            name="bench",
            encoder=encoder,
            sparsifier=TopKConfig(k=shape.k) if sparsifier is None else sparsifier,
            optimizer=OptimizerConfig(lr=LR, clip_norm=None),
            normalize_activations="none",
        )
        self.member = Member(config, shape.d_in, "bench", steps=10_000, device=device)

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        self.member.step(x_BD, 0, want_metrics=False)


def encoders(shape: Shape) -> dict[str, EncoderConfig]:
    """Return a dense and a Kronecker encoder of this shape."""
    heads = KroneckerEncoderConfig(num_heads=shape.num_heads, d_base=shape.d_base, d_extension=shape.d_extension)
    return {"dense": DenseEncoderConfig(d_sae=shape.d_sae), "kron": heads}


def kronsae(shape: Shape, device: Place = "cpu") -> Subject:
    """Return KronSAE."""
    return OwnTrainer(shape, encoders(shape)["kron"], device=device)


def topk(shape: Shape, device: Place = "cpu") -> Subject:
    """Return this library's TopK SAE."""
    return OwnTrainer(shape, encoders(shape)["dense"], device=device)


class PaperListing(nn.Module):
    """KronSAE as described by its paper's listing (arXiv 2505.22255, appendix H).

    One matrix for all pre-latents, then ReLU. All F values ``sqrt(p q + 1e-5)`` are materialised; their TopK is
    scattered into a dense B x F tensor, followed by a dense product with W_dec. Autograd differentiates all of it.
    """

    def __init__(self, shape: Shape, device: Place = "cpu") -> None:
        super().__init__()
        self.shape = shape
        self.encoder = nn.Linear(shape.d_in, shape.pre_latents, device=device)
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in, device=device), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(shape.d_in, device=device))
        nn.init.normal_(self.encoder.weight, std=(2 * shape.d_sae) ** -0.5)
        nn.init.zeros_(self.encoder.bias)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LR, fused=True)

    def forward(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        shape = self.shape
        pre_BHP = self.encoder(x_BD).relu().view(len(x_BD), shape.num_heads, -1)
        p_BHM, q_BHN = pre_BHP.split([shape.d_base, shape.d_extension], dim=-1)
        z_BF = torch.sqrt(p_BHM.unsqueeze(-1) * q_BHN.unsqueeze(-2) + 1e-5).flatten(1)
        values_BK, indices_BK = z_BF.topk(shape.k, dim=-1)
        f_BF = torch.zeros_like(z_BF).scatter(-1, indices_BK, values_BK)
        return f_BF @ self.W_dec + self.b_dec

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        self.optimizer.zero_grad()
        (x_BD - self(x_BD)).square().sum(-1).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


class Sparsify:
    """EleutherAI's `sparsify` (PyPI eai-sparsify): fused TopK encoder and its own sparse decoder."""

    def __init__(self, shape: Shape, device: Place = "cpu") -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
        self.coder: Any = SparseCoder(shape.d_in, config, device=str(device), dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.coder.parameters(), lr=LR, fused=True)

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        self.optimizer.zero_grad()
        self.coder(x_BD).fvu.backward()
        self.optimizer.step()
        self.coder.set_decoder_norm_to_unit_norm()


class SAELens:
    """SAELens' TopK training SAE (PyPI sae-lens) with the loss of its trainer."""

    def __init__(self, shape: Shape, device: Place = "cpu") -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        sizes = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k}
        config = TopKTrainingSAEConfig(**sizes, dtype="float32", device=str(device))
        self.sae: Any = TopKTrainingSAE(config)
        self.optimizer = torch.optim.AdamW(self.sae.parameters(), lr=LR, fused=True)

    def step(self, x_BD: Float[Tensor, "B D"]) -> None:
        from sae_lens.saes.sae import TrainStepInput

        self.optimizer.zero_grad()
        given = TrainStepInput(
            sae_in=x_BD, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        self.sae.training_forward_pass(given).loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class Entry:
    """A contestant's name in results, its constructor, and the package it needs (import name, name on PyPI)."""

    name: str
    build: Callable[..., Subject]  # of a shape and, if it is not the CPU, a device
    package: tuple[str, str] | None = None

    def missing(self) -> str | None:
        """Return why it cannot be measured here; None if it can."""
        if self.package is None or importlib.util.find_spec(self.package[0]) is not None:
            return None
        return f"{self.package[1]} is not installed (pip install 'kronsae[bench]')"


REGISTRY = (
    Entry("encoder_product", EncoderProduct),
    Entry("kronsae", kronsae),
    Entry("topk", topk),
    Entry("paper_listing", PaperListing),
    Entry("sparsify", Sparsify, ("sparsify", "eai-sparsify")),
    Entry("saelens", SAELens, ("sae_lens", "sae-lens")),
)
