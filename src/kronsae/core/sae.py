"""``SAE(encoder, sparsifier, decoder)``: a sparse autoencoder composed of its parts.

A transcoder reads one hook and writes another; a crosscoder reads and writes several hooks, concatenated. Both are
instances of this class that differ only in their widths.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder, Skip
from kronsae.core.encoders import DenseEncoder, Encoder, KroneckerEncoder
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoder, SwitchEncoderConfig
from kronsae.core.heads import head_grid
from kronsae.core.pursuit import Pursuit, choose_and_pursue
from kronsae.core.sparsifiers import BatchTopK, JumpReLU, SparsifierConfig, TopK
from kronsae.core.trunk import TrunkEncoder, TrunkEncoderConfig
from kronsae.support.errors import UserError

if TYPE_CHECKING:  # those of the library, whose attributes analyses use after asking for the class
    AnyEncoder = DenseEncoder | KroneckerEncoder | TrunkEncoder | SwitchEncoder
else:  # also one of a user's own
    AnyEncoder = Encoder


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape of an SAE; with its weights, all that is needed to run it.

    Args:
        d_in: D, the input width. For several hooks, concatenated, the sum of their widths.
        encoder: dense, Kronecker, Kronecker with a dense trunk, or switch.
        sparsifier: how active latents are selected.
        read_widths: width of each hook read; (): one hook of ``d_in``.
        write_widths: width of each hook written, if these differ from the hooks read; (): the input is reconstructed.
        skip: whether to add ``W_skip x`` to the output (skip transcoders, Paulo et al. 2025).
        pursuit: how the codes are computed from the encoder's candidates (`kronsae.core.pursuit`); None: they are the
            encoder's.
    """

    d_in: int
    encoder: AnyEncoderConfig
    sparsifier: SparsifierConfig
    read_widths: tuple[int, ...] = ()
    write_widths: tuple[int, ...] = ()
    skip: bool = False
    pursuit: Pursuit | None = None

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
                "skip must be used with an output hook that differs from the input hook; with the same hook the skip "
                "connection would copy the input. Set the hooks to write, or leave skip out."
            )
        self.sparsifier.check(self.encoder)
        if self.pursuit is not None:
            self.check_pursuit(self.pursuit)

    def check_pursuit(self, pursuit: Pursuit) -> None:
        """Refuse a pursuit that is not defined for this SAE.

        Raises:
            UserError: it is a transcoder or a crosscoder, its k is not fixed, or it has too few latents.
        """
        pursuit.check(self.sparsifier.kind, self.sparsifier.k, self.encoder.latents_per_token, self.role)

    @property
    def autoencodes(self) -> bool:
        """Whether it reconstructs its input: an SAE, or a crosscoder that writes the hooks it reads."""
        return not self.write_widths

    @property
    def widths_read(self) -> tuple[int, ...]:
        """Width of each hook read."""
        return self.read_widths or (self.d_in,)

    @property
    def widths_written(self) -> tuple[int, ...]:
        """Width of each hook written."""
        return self.write_widths or self.widths_read

    @property
    def d_out(self) -> int:
        """O, the output width; ``d_in`` for an SAE."""
        return sum(self.widths_written)

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as ``kronecker-topk`` or ``dense-topk-switch-transcoder``."""
        switch = isinstance(self.encoder, SwitchEncoderConfig)
        encoder = self.encoder.expert if isinstance(self.encoder, SwitchEncoderConfig) else self.encoder
        parts = [encoder.kind, self.sparsifier.kind, "switch" if switch else "", self.role]
        return "-".join(part for part in parts if part)

    @property
    def role(self) -> str:
        """``crosscoder`` if several hooks are read or written, ``transcoder`` if another hook is written, else ``""``.

        With a skip connection the name has the prefix ``skip_``.
        """
        several = max(len(self.widths_read), len(self.widths_written)) > 1
        role = "crosscoder" if several else "" if self.autoencodes else "transcoder"
        return f"skip_{role}" if self.skip else role

    @property
    def sizes(self) -> dict[str, int | str]:
        """Sizes by name: widths (``"16+16"`` for several hooks), latents, k, heads, experts."""
        found: dict[str, int | str] = {"d_in": "+".join(map(str, self.widths_read))}
        if not self.autoencodes:
            found["d_out"] = "+".join(map(str, self.widths_written))
        found |= {"d_sae": self.d_sae, "k": self.sparsifier.k}
        if (grid := head_grid(self.encoder)) is not None:
            found |= {name: size for name, size in asdict(grid).items() if size}  # not null_symbols=False
        if isinstance(self.encoder, SwitchEncoderConfig):
            found["num_experts"] = self.encoder.num_experts
        if isinstance(self.encoder, TrunkEncoderConfig):
            heads = self.encoder.heads
            found |= {"d_trunk": self.encoder.trunk.d_sae, "num_heads": heads.num_heads}
            found |= {"d_base": heads.d_base, "d_extension": heads.d_extension}
        if self.pursuit is not None:
            found |= {f"pursuit_{name}": getattr(self.pursuit, name) for name in ("rounds", "candidates", "refit")}
        return found

    def build(self, seed: int = 0) -> SAE:
        """Return an initialised SAE (as in the paper); equal seeds give equal weights.

        If the SAE reconstructs its input, the decoder starts with the encoder's rows. Otherwise these rows mean nothing
        for the output, and the decoder starts with random directions (Dunefsky et al. 2024). Rows of 0, the other
        common choice, have no direction to normalise and pass no gradient to the encoder.
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
        """Return an SAE with uninitialised weights."""
        return SAE(
            self.encoder.build(self.d_in),
            self.sparsifier.build(self.d_sae),
            Decoder(self.d_sae, self.d_out),
            Skip(self.d_in, self.d_out) if self.skip else None,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
            pursuit=self.pursuit,
        )


class SAE(nn.Module):
    """A sparse autoencoder: ``x_hat = decode(sparsify(encode(x)))``.

    Args:
        encoder: computes lazy latents of ``x [B, d_in]``.
        sparsifier: selects the active latents.
        decoder: sums the selected rows of ``W_dec [d_sae, d_out]`` and adds ``b_dec``.
        skip: adds ``W_skip x``; None: no skip connection.
        read_widths, write_widths, pursuit: as in `SAEConfig`.

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
        encoder: AnyEncoder,
        sparsifier: TopK | BatchTopK | JumpReLU,
        decoder: Decoder,
        skip: Skip | None = None,
        *,
        read_widths: tuple[int, ...] = (),
        write_widths: tuple[int, ...] = (),
        pursuit: Pursuit | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.sparsifier, self.decoder, self.skip = encoder, sparsifier, decoder, skip
        self.read_widths, self.write_widths, self.pursuit = read_widths, write_widths, pursuit

    @property
    def config(self) -> SAEConfig:
        """Shape of the SAE, as saved to ``cfg.json``."""
        return SAEConfig(
            d_in=self.d_in,
            encoder=self.encoder.config,
            sparsifier=self.sparsifier.config,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
            skip=self.skip is not None,
            pursuit=self.pursuit,
        )

    @property
    def d_in(self) -> int:
        """D, the input width."""
        return self.encoder.d_in

    @property
    def d_out(self) -> int:
        """O, the output width; ``d_in`` for an SAE."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        return self.encoder.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "F O"]:
        """Dictionary: one direction per latent."""
        return self.decoder.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " O"]:
        """Bias of the decoder."""
        return self.decoder.b_dec

    @property
    def W_dec_by_hook(self) -> tuple[Float[Tensor, "F _"], ...]:
        """Views of ``W_dec``, one ``[d_sae, width]`` per hook written: a crosscoder's directions at each hook."""
        parts: tuple[Tensor, ...] = self.W_dec.split(self.write_widths or self.read_widths or self.d_out, dim=1)
        return parts

    def encode(self, x: Float[Tensor, "... D"], pursuit: Pursuit | None = None) -> SparseCodes:
        """Return the sparse codes of activations; leading dimensions are kept.

        Args:
            x: activations.
            pursuit: how the codes are pursued; None: as the SAE's config says. ``Pursuit(rounds=1, refit=0)`` gives
                the encoder's own codes of an SAE that has a pursuit.

        Raises:
            UserError: the last dimension is not ``d_in``, the dtype is not the SAE's, or the pursuit is not defined.
        """
        self._check_input(x)
        if pursuit is None:
            pursuit = self.pursuit
        elif pursuit != self.pursuit:
            self.config.check_pursuit(pursuit)
        x_BD = x.reshape(-1, self.d_in)
        latents = self.encoder(x_BD)
        codes: SparseCodes
        if pursuit is None:
            codes = self.sparsifier(latents)
        else:
            (codes,) = choose_and_pursue(pursuit, x_BD, latents, self.decoder, self.sparsifier.config.k)
        return codes.reshape(*x.shape[:-1])

    def decode(self, codes: SparseCodes, x: Float[Tensor, "... D"] | None = None) -> Float[Tensor, "... O"]:
        """Return the reconstruction from codes; leading dimensions are kept.

        Args:
            codes: output of `encode`.
            x: input of `encode`. Only a skip connection uses it.

        Raises:
            UserError: codes of another dictionary, or no ``x`` with a skip connection.
        """
        if codes.d_sae != self.d_sae:
            raise UserError(f"codes must have d_sae={self.d_sae} latents; got {codes.d_sae}.")
        x_hat_BO: Tensor = self.decoder(codes.reshape(-1))
        x_hat = x_hat_BO.reshape(*codes.values.shape[:-1], self.d_out)
        if self.skip is None:
            return x_hat
        if x is None:
            raise UserError("x must be given to decode an SAE with a skip connection. Call decode(codes, x).")
        skipped: Tensor = self.skip(x)
        return x_hat + skipped

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """Return ``decode(encode(x), x)``."""
        return self.decode(self.encode(x), x)

    def trained(self) -> SAE:
        """Return the SAE to save: same outputs, without parts that only training needs. It shares the weights."""
        return SAE(
            self.encoder,
            self.sparsifier.trained(),
            self.decoder,
            self.skip,
            read_widths=self.read_widths,
            write_widths=self.write_widths,
            pursuit=self.pursuit,
        )

    def extra_repr(self) -> str:
        """Architecture and sizes, printed above the submodules."""
        return describe_config(self.config)

    def unsound_weight(self) -> str | None:
        """Return the name of a weight that holds NaN or infinity; None if all weights are finite.

        A sparsifier may hold minus infinity: the logarithm of a threshold of 0.
        """
        for name, weight in self.state_dict().items():
            sound = weight.isfinite()
            if name.startswith("sparsifier."):
                sound |= weight == -torch.inf
            if not bool(sound.all()):
                return name
        return None

    def num_parameters(self) -> int:
        """Return the number of weights and biases; for one part, use ``count_parameters(sae.encoder)``."""
        return count_parameters(self)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise UserError(f"x must have d_in={self.d_in} as its last dimension; got shape {tuple(x.shape)}.")
        if x.dtype != self.W_dec.dtype:
            raise UserError(
                f"x must have the SAE's dtype, {self.W_dec.dtype}; got {x.dtype}. Convert it: x.to(sae.W_dec.dtype)."
            )


def describe_config(config: SAEConfig) -> str:
    """Describe a config: ``kronecker-topk, d_in=256, d_sae=4096, k=32, num_heads=512, d_base=2, d_extension=4``."""
    return ", ".join([config.architecture, *(f"{name}={size}" for name, size in config.sizes.items())])


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights and biases of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
