"""``SAE(encoder, sparsifier, decoder)``: everything a sparse autoencoder is, by composition.

A transcoder writes at another hook than it reads; a crosscoder reads and writes several hooks side by side. Both are
this class: their widths differ, and nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder, Skip
from kronsae.core.encoders import DenseEncoder, KroneckerEncoder
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoder, SwitchEncoderConfig
from kronsae.core.heads import head_grid
from kronsae.core.sparsifiers import BatchTopK, JumpReLU, SparsifierConfig, TopK
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """An SAE's shape: with its weights, all that is needed to run it.

    Args:
        d_in: D, width of what is read: of several hooks, side by side, their widths' sum.
        encoder: dense, Kronecker or switch.
        sparsifier: which latents stay.
        read_widths: the width of each hook read; (): one hook of ``d_in``.
        write_widths: the width of each hook written, where these are others than those read; (): what is read is
            reconstructed.
        skip: add ``W_skip x`` to what is written (skip transcoders, Paulo et al. 2025).
    """

    d_in: int
    encoder: AnyEncoderConfig
    sparsifier: SparsifierConfig
    read_widths: tuple[int, ...] = ()
    write_widths: tuple[int, ...] = ()
    skip: bool = False

    def __post_init__(self) -> None:
        check_count("d_in", self.d_in)
        for name in ("read_widths", "write_widths"):
            for width in getattr(self, name):
                check_count(name, width)
        if self.read_widths and sum(self.read_widths) != self.d_in:
            listed = " + ".join(map(str, self.read_widths))
            raise UserError(
                f"read_widths must sum to d_in; got {listed} = {sum(self.read_widths)} with d_in={self.d_in}. "
                "Leave read_widths out, or change one."
            )
        if self.skip and self.autoencodes:
            raise UserError(
                "skip needs another hook to write than the one read: past the dictionary an SAE would copy its input. "
                "Name the hooks written, or leave skip out."
            )
        self.sparsifier.check(self.encoder)

    @property
    def autoencodes(self) -> bool:
        """Whether it reconstructs what it reads: an SAE, or a crosscoder that writes the hooks it reads."""
        return not self.write_widths

    @property
    def widths_read(self) -> tuple[int, ...]:
        """The width of each hook read."""
        return self.read_widths or (self.d_in,)

    @property
    def widths_written(self) -> tuple[int, ...]:
        """The width of each hook written."""
        return self.write_widths or self.widths_read

    @property
    def d_out(self) -> int:
        """O, width of what is written; ``d_in`` for an SAE."""
        return sum(self.widths_written)

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def architecture(self) -> str:
        """The name of this cell of the comparison, such as ``kronecker-topk`` or ``dense-topk-switch-transcoder``."""
        switch = isinstance(self.encoder, SwitchEncoderConfig)
        encoder = self.encoder.expert if isinstance(self.encoder, SwitchEncoderConfig) else self.encoder
        parts = [encoder.kind, self.sparsifier.kind, "switch" if switch else "", self.role]
        return "-".join(part for part in parts if part)

    @property
    def role(self) -> str:
        """``crosscoder``: several hooks are read or written; ``transcoder``: another one is written; ``""``: an SAE.

        With ``skip_`` in front where there is a skip connection.
        """
        several = max(len(self.widths_read), len(self.widths_written)) > 1
        role = "crosscoder" if several else "" if self.autoencodes else "transcoder"
        return f"skip_{role}" if self.skip else role

    @property
    def sizes(self) -> dict[str, int | str]:
        """What tells its size, by name: widths (``"16+16"`` of several hooks), latents, k, heads, experts."""
        found: dict[str, int | str] = {"d_in": "+".join(map(str, self.widths_read))}
        if not self.autoencodes:
            found["d_out"] = "+".join(map(str, self.widths_written))
        found |= {"d_sae": self.d_sae, "k": self.sparsifier.k}
        if (grid := head_grid(self.encoder)) is not None:
            found |= asdict(grid)
        if isinstance(self.encoder, SwitchEncoderConfig):
            found["num_experts"] = self.encoder.num_experts
        return found

    def build(self, seed: int = 0) -> SAE:
        """A freshly initialised SAE (the paper's start); equal seeds give equal weights.

        The decoder starts as the encoder's rows where it writes what they read. Elsewhere these mean nothing, and its
        rows start in random directions (Dunefsky et al. 2024): rows of 0, the other choice of the field, have no
        direction to keep at norm 1, and pass no gradient on to the encoder.
        """
        sae = self.build_empty()
        generator = torch.Generator().manual_seed(seed)
        sae.encoder.initialize(generator)
        if self.autoencodes:
            sae.decoder.initialize(sae.encoder.initial_decoder_rows())
        else:
            sae.decoder.initialize(torch.randn(self.d_sae, self.d_out, generator=generator))
        if sae.skip is not None:
            sae.skip.initialize()
        return sae

    def build_empty(self) -> SAE:
        """An SAE whose weights are yet to be filled in."""
        return SAE(
            self.encoder.build(self.d_in),
            self.sparsifier.build(self.d_sae),
            Decoder(self.d_sae, self.d_out),
            Skip(self.d_in, self.d_out) if self.skip else None,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
        )


class SAE(nn.Module):
    """A sparse autoencoder: ``x_hat = decode(sparsify(encode(x)))``.

    Args:
        encoder: gives lazy latents of ``x [B, d_in]``.
        sparsifier: chooses which of them stay.
        decoder: reads the chosen rows of ``W_dec [d_sae, d_out]`` and adds ``b_dec``.
        skip: adds ``W_skip x``; None: nothing is added.
        read_widths, write_widths: as in `SAEConfig`.

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
        skip: Skip | None = None,
        *,
        read_widths: tuple[int, ...] = (),
        write_widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.sparsifier, self.decoder, self.skip = encoder, sparsifier, decoder, skip
        self.read_widths, self.write_widths = read_widths, write_widths

    @property
    def config(self) -> SAEConfig:
        """The shape, as saved to ``cfg.json``."""
        return SAEConfig(
            d_in=self.d_in,
            encoder=self.encoder.config,
            sparsifier=self.sparsifier.config,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
            skip=self.skip is not None,
        )

    @property
    def d_in(self) -> int:
        """D, width of the activations read."""
        return self.encoder.d_in

    @property
    def d_out(self) -> int:
        """O, width of the activations written; ``d_in`` for an SAE."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "F O"]:
        """The dictionary: one direction per latent."""
        return self.decoder.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " O"]:
        """The decoder's bias."""
        return self.decoder.b_dec

    @property
    def W_dec_by_hook(self) -> tuple[Float[Tensor, "F _"], ...]:
        """``W_dec`` of each hook written, ``[d_sae, width]`` each, as views: where a crosscoder's latents live."""
        parts: tuple[Tensor, ...] = self.W_dec.split(self.write_widths or self.read_widths or self.d_out, dim=1)
        return parts

    def encode(self, x: Float[Tensor, "... D"]) -> SparseCodes:
        """Sparse codes of activations; leading dimensions are kept.

        Raises:
            UserError: the last dimension is not ``d_in``, or the dtype is not the SAE's.
        """
        self._check_input(x)
        codes: SparseCodes = self.sparsifier(self.encoder(x.reshape(-1, self.d_in)))
        return codes.reshape(*x.shape[:-1])

    def decode(self, codes: SparseCodes, x: Float[Tensor, "... D"] | None = None) -> Float[Tensor, "... O"]:
        """The reconstruction of codes; leading dimensions are kept.

        Args:
            codes: what `encode` gave.
            x: what it was given: a skip connection reads it too. Without one it plays no part.

        Raises:
            UserError: codes of another dictionary, or no ``x`` though there is a skip connection.
        """
        if codes.d_sae != self.d_sae:
            raise UserError(f"codes must be of d_sae={self.d_sae} latents; got codes of {codes.d_sae}.")
        x_hat_BO: Tensor = self.decoder(codes.reshape(-1))
        x_hat = x_hat_BO.reshape(*codes.values.shape[:-1], self.d_out)
        if self.skip is None:
            return x_hat
        if x is None:
            raise UserError("decode needs x where there is a skip connection, W_skip x; give decode(codes, x).")
        skipped: Tensor = self.skip(x)
        return x_hat + skipped

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)

    def trained(self) -> SAE:
        """What is saved: the same outputs, without what only training needs. It shares this SAE's weights."""
        return SAE(
            self.encoder,
            self.sparsifier.trained(),
            self.decoder,
            self.skip,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
        )

    def extra_repr(self) -> str:
        """Architecture and sizes, which ``print`` shows above the parts."""
        return in_words(self.config)

    def unsound_weight(self) -> str | None:
        """The name of a weight that holds NaN or infinity; None where all are sound.

        In a sparsifier -infinity is sound: the logarithm of a threshold of 0.
        """
        for name, weight in self.state_dict().items():
            sound = weight.isfinite()
            if name.startswith("sparsifier."):
                sound |= weight == -torch.inf
            if not bool(sound.all()):
                return name
        return None

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


def in_words(config: SAEConfig) -> str:
    """``kronecker-topk, d_in=256, d_sae=4096, k=32, num_heads=512, d_base=2, d_extension=4``."""
    return ", ".join([config.architecture, *(f"{name}={size}" for name, size in config.sizes.items())])


def count_parameters(module: nn.Module) -> int:
    """Weights and biases of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
