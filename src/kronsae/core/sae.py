"""``SAE(encoder, sparsifier, decoder)``: everything a sparse autoencoder is, by composition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.encoders import DenseEncoder, KroneckerEncoder
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoder, SwitchEncoderConfig
from kronsae.core.sparsifiers import BatchTopK, JumpReLU, SparsifierConfig, TopK
from kronsae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """An SAE's shape: with its weights, all that is needed to run it."""

    d_in: int
    encoder: AnyEncoderConfig
    sparsifier: SparsifierConfig

    def __post_init__(self) -> None:
        check_count("d_in", self.d_in)
        self.sparsifier.check(self.encoder)

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def architecture(self) -> str:
        """The name of this cell of the comparison, such as ``kronecker-topk`` or ``dense-topk-switch``."""
        if isinstance(self.encoder, SwitchEncoderConfig):
            return f"{self.encoder.expert.kind}-{self.sparsifier.kind}-switch"
        return f"{self.encoder.kind}-{self.sparsifier.kind}"

    def build(self, seed: int = 0) -> SAE:
        """A freshly initialised SAE (the paper's start); equal seeds give equal weights."""
        sae = self.build_empty()
        sae.encoder.initialize(torch.Generator().manual_seed(seed))
        sae.decoder.initialize(sae.encoder.initial_decoder_rows())
        return sae

    def build_empty(self) -> SAE:
        """An SAE whose weights are yet to be filled in."""
        return SAE(self.encoder.build(self.d_in), self.sparsifier.build(self.d_sae), Decoder(self.d_sae, self.d_in))


class SAE(nn.Module):
    """A sparse autoencoder: ``x_hat = decode(sparsify(encode(x)))``.

    Args:
        encoder: gives lazy latents of ``x [B, d_in]``.
        sparsifier: chooses which of them stay.
        decoder: reads the chosen rows of ``W_dec [d_sae, d_in]`` and adds ``b_dec``.

    Example:
        >>> from kronsae.core.encoders import KroneckerEncoderConfig
        >>> from kronsae.core.sparsifiers import TopKConfig
        >>> shape = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=4)
        >>> sae = SAEConfig(d_in=8, encoder=shape, sparsifier=TopKConfig(k=3)).build()
        >>> codes = sae.encode(torch.randn(5, 8))
        >>> codes.values.shape, sae.decode(codes).shape
        (torch.Size([5, 3]), torch.Size([5, 8]))
    """

    def __init__(
        self,
        encoder: DenseEncoder | KroneckerEncoder | SwitchEncoder,
        sparsifier: TopK | BatchTopK | JumpReLU,
        decoder: Decoder,
    ) -> None:
        super().__init__()
        self.encoder, self.sparsifier, self.decoder = encoder, sparsifier, decoder

    @property
    def config(self) -> SAEConfig:
        """The shape, as saved to ``cfg.json``."""
        return SAEConfig(d_in=self.d_in, encoder=self.encoder.config, sparsifier=self.sparsifier.config)

    @property
    def d_in(self) -> int:
        """D, width of the activations read and reconstructed."""
        return self.encoder.d_in

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "F D"]:
        """The dictionary: one direction per latent."""
        return self.decoder.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " D"]:
        """The decoder's bias."""
        return self.decoder.b_dec

    def encode(self, x: Float[Tensor, "... D"]) -> SparseCodes:
        """Sparse codes of activations; leading dimensions are kept.

        Raises:
            UserError: the last dimension is not ``d_in``, or the dtype is not the SAE's.
        """
        self._check_input(x)
        codes: SparseCodes = self.sparsifier(self.encoder(x.reshape(-1, self.d_in)))
        return codes.reshape(*x.shape[:-1])

    def decode(self, codes: SparseCodes) -> Float[Tensor, "... D"]:
        """The reconstruction of codes; leading dimensions are kept."""
        if codes.d_sae != self.d_sae:
            raise UserError(f"codes must be of d_sae={self.d_sae} latents; got codes of {codes.d_sae}.")
        x_hat_BD: Tensor = self.decoder(codes.reshape(-1))
        return x_hat_BD.reshape(*codes.values.shape[:-1], self.d_in)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def trained(self) -> SAE:
        """What is saved: the same outputs, without what only training needs. It shares this SAE's weights."""
        return SAE(self.encoder, self.sparsifier.trained(), self.decoder)

    def num_parameters(self) -> int:
        """Weights and biases in all; `count_parameters` counts those of a part, such as ``sae.encoder``."""
        return count_parameters(self)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise UserError(f"x must have d_in={self.d_in} as its last dimension; got shape {tuple(x.shape)}.")
        if x.dtype != self.W_dec.dtype:
            raise UserError(
                f"x must be {self.W_dec.dtype}, as the SAE is; got {x.dtype}. Convert one: x.to(sae.W_dec.dtype)."
            )


def count_parameters(module: nn.Module) -> int:
    """Weights and biases of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
