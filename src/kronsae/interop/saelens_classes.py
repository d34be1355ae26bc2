"""Our architectures as classes of SAELens, for inference; `kronsae.interop.saelens` registers them.

An SAE of SAELens holds an `SAE` of ours and delegates to it. ``encode`` gives dense latents, as SAELens expects them.
``W_enc`` and ``b_enc`` do not exist: a factorised encoder has no row per latent. ``fold_W_dec_norm`` is refused for the
same reason, unless the rows of ``W_dec`` have norm 1 and there is nothing to fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE as LensSAE
from sae_lens import SAEConfig as LensSAEConfig
from sae_lens.saes.topk_sae import TopK as LensTopK
from torch import Tensor

from kronsae.core.encoders import KroneckerEncoder
from kronsae.core.gates import GateName
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import BatchTopK, JumpReLU, TopK, TopKConfig, jump
from kronsae.interop import saelens_layout
from kronsae.support.errors import UserError

NO_W_ENC = (
    "a KronSAE has no W_enc or b_enc: its encoder is factorised, and latent (h, i, j) is gate(u[h, i], v[h, j]) of two "
    "parents. Use sae.kronsae.encoder.W_base and W_extension, or encode activations."
)

BANDWIDTH = 0.5
"""Of the estimator of a threshold's gradient, which is not used here: the thresholds are detached."""

UNIT_NORM_TOLERANCE = 0.01
"""Of the norms of decoder rows from 1; bfloat16 rounds them by up to 0.004."""


@dataclass
class KronTopKSAEConfig(LensSAEConfig):  # type: ignore[misc]
    """Config of a KronSAE with TopK.

    Args:
        d_base: bases per head.
        d_extension: extensions per head; there are ``d_sae / (d_base * d_extension)`` heads.
        gate: how a base and an extension compose (`kronsae.core.gates`).
        k: active latents per token.
    """

    apply_b_dec_to_input: bool = False
    d_base: int = 2
    d_extension: int = 4
    gate: GateName = "mand"
    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)


@dataclass
class KronJumpReLUSAEConfig(KronTopKSAEConfig):
    """Config of a KronSAE with a threshold per latent; ``k`` is its l0."""

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_jumprelu"


@dataclass
class KronTopKTranscoderConfig(KronTopKSAEConfig):
    """Config of a KronSAE that writes another hook, of width ``d_out``; with ``skip``, it adds ``W_skip x``."""

    d_out: int = 768
    skip: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_topk_transcoder"


@dataclass
class KronJumpReLUTranscoderConfig(KronTopKTranscoderConfig):
    """Config of a transcoder with a threshold per latent."""

    @classmethod
    def architecture(cls) -> str:
        return "kronsae_jumprelu_transcoder"


def check(config: Any) -> None:
    """Refuse settings that a KronSAE does not have.

    Raises:
        UserError: ``apply_b_dec_to_input``, or sizes that do not fit.
    """
    if config.apply_b_dec_to_input:
        raise UserError(
            "apply_b_dec_to_input must be False for a KronSAE, whose encoder has biases of its own; got True."
        )
    shape_of(config)


def shape_of(config: Any) -> SAEConfig:
    """Return our config of an SAE, from a config of SAELens with one of our architectures."""
    return saelens_layout.kron_config(
        config.architecture(),
        d_in=config.d_in,
        d_sae=config.d_sae,
        d_base=config.d_base,
        d_extension=config.d_extension,
        gate=config.gate,
        k=config.k,
        d_out=getattr(config, "d_out", None),
        skip=getattr(config, "skip", False),
    )


class KronSAEMixin:
    """What all our classes in SAELens share; the SAE itself is ``kronsae``, an `SAE` of ours.

    The tensors have other names in a file (`saelens_layout.to_disk`), and all are floating-point: SAELens casts every
    tensor to the config's dtype. While it loads, the class is built on the meta device.
    """

    kronsae: SAE
    cfg: Any
    device: torch.device
    dtype: torch.dtype
    d_head: int | None
    hook_sae_input: Any
    hook_sae_acts_pre: Any
    hook_sae_acts_post: Any
    hook_sae_recons: Any
    reshape_fn_in: Any
    reshape_fn_out: Any
    run_time_activation_norm_fn_in: Any
    run_time_activation_norm_fn_out: Any

    unit_norm: bool = True
    """Whether the rows of ``W_dec`` are kept at norm 1 in training; not after a fold that scales them."""

    def initialize_weights(self) -> None:
        """Build our SAE with weights as `SAEConfig.build` draws them, seeded by torch's generator."""
        config = shape_of(self.cfg)
        if self.device.type == "meta":
            with torch.device("meta"):
                self.kronsae = config.build_empty().to(self.dtype)
        else:
            seed = int(torch.randint(2**31, ()).item())
            self.kronsae = config.build(seed).to(self.device, self.dtype)

    @property
    def W_dec(self) -> Tensor:
        """Dictionary, ``[d_sae, d_out]``."""
        return self.kronsae.W_dec

    @property
    def b_dec(self) -> Tensor:
        """Bias of the decoder."""
        return self.kronsae.b_dec

    def __getattr__(self, name: str) -> Any:
        if name in ("W_enc", "b_enc"):
            raise AttributeError(NO_W_ENC)
        return super().__getattr__(name)  # type: ignore[misc]

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Return the input in the SAE's dtype, reshaped and normalised as SAELens does; ``b_dec`` is not subtracted."""
        sae_in = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        normalised: Tensor = self.run_time_activation_norm_fn_in(sae_in)
        return normalised

    def encode(self, x: Tensor) -> Tensor:
        """Return dense latents ``[..., d_sae]``.

        All latents before the selection are computed only if ``hook_sae_acts_pre`` has a hook; what the hook returns
        is then selected from.
        """
        sae_in = self.process_sae_in(x)
        latents = self.kronsae.encoder(sae_in.reshape(-1, self.cfg.d_in))
        shape = (*sae_in.shape[:-1], self.cfg.d_sae)
        if has_hooks(self.hook_sae_acts_pre):
            acts = self._select(self.hook_sae_acts_pre(latents.materialize().reshape(shape)))
        else:
            acts = self.kronsae.sparsifier(latents).to_dense().reshape(shape)
        hooked: Tensor = self.hook_sae_acts_post(acts)
        return hooked

    def _select(self, pre: Tensor) -> Tensor:
        """Select from dense latents that a hook returned."""
        sparsifier = self.kronsae.sparsifier
        if isinstance(sparsifier, TopK):
            selected: Tensor = LensTopK(sparsifier.config.k)(pre)
            return selected
        assert isinstance(sparsifier, JumpReLU | BatchTopK)
        return jump(pre, sparsifier.log_threshold.detach(), BANDWIDTH)[0]

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction; as in SAELens' own transcoders, ``W_skip x`` is added by ``forward`` alone."""
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        if not self.kronsae.config.autoencodes:
            return recons  # type: ignore[no-any-return]
        shaped: Tensor = self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)
        return shaped

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Give the tensors the names that they have in a file."""
        weights = {name.removeprefix("kronsae."): state_dict.pop(name) for name in list(state_dict)}
        state_dict |= {name: tensor.contiguous() for name, tensor in saelens_layout.to_disk(weights).items()}

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Give the tensors of a file the names that they have here."""
        weights = saelens_layout.from_disk({name: state_dict.pop(name) for name in list(state_dict)})
        state_dict |= {f"kronsae.{name}": tensor for name, tensor in weights.items()}

    def get_activation_fn(self) -> LensTopK:
        """Return SAELens' TopK; tools that find one encode all latents at once, as none can be computed alone.

        It is not used here. With thresholds, k is ``d_sae``: a ReLU.
        """
        by_count = saelens_layout.SPARSIFIERS[self.cfg.architecture()] is TopKConfig
        return LensTopK(self.cfg.k if by_count else self.cfg.d_sae)

    def fold_W_dec_norm(self) -> None:
        """Do nothing where the rows of ``W_dec`` have norm 1, as after training; otherwise refuse.

        The M * N latents of a head share M + N rows of the encoder, so none can be scaled alone.
        """
        norms_F = self.W_dec.norm(dim=-1)
        if not bool(((norms_F - 1).abs() <= UNIT_NORM_TOLERANCE).all()):
            raise NotImplementedError(
                "fold_W_dec_norm is not possible for a KronSAE whose decoder rows have other norms than 1: the latents "
                f"of a head share their rows, so none can be scaled alone. Norms are {float(norms_F.min()):.3g} to "
                f"{float(norms_F.max()):.3g}."
            )

    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Return ones where the rows of ``W_dec`` have norm 1; otherwise refuse, as `fold_W_dec_norm`."""
        self.fold_W_dec_norm()
        return torch.ones_like(self.W_dec[:, 0])

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Rewrite the weights, trained on ``x * scaling_factor``, for x.

        Latents become smaller by this factor, so that the rows of ``W_dec`` keep norm 1. With a gate that is not
        homogeneous, the latents stay and the rows become smaller, as in SAELens.
        """
        encoder = self.kronsae.encoder
        assert isinstance(encoder, KroneckerEncoder)
        self.unit_norm = encoder.gate.homogeneous
        zero_D, scale = self.b_dec.new_zeros(self.cfg.d_in), self.b_dec.new_tensor(1 / scaling_factor)
        latent_scale = scale if self.unit_norm else torch.ones_like(scale)
        encoder.fold(zero_D, scale.expand(self.cfg.d_in), latent_scale)
        self.kronsae.decoder.fold(torch.zeros_like(self.b_dec), scale.expand_as(self.b_dec), latent_scale)
        self.kronsae.sparsifier.rescale(latent_scale)
        self.cfg.normalize_activations = "none"

    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Rewrite the weights, trained on ``(x - mean) @ whitening_matrix``, for x; the latents stay."""
        encoder = self.kronsae.encoder
        assert isinstance(encoder, KroneckerEncoder)
        self.unit_norm = False
        mean, matrix, inverse = (one.double() for one in (mean, whitening_matrix, unwhitening_matrix))
        encoder.weight.copy_(encoder.weight.double() @ matrix.T)
        encoder.bias.sub_((encoder.weight.double() @ mean).to(encoder.bias.dtype))
        self.W_dec.copy_(self.W_dec.double() @ inverse)
        self.b_dec.copy_(self.b_dec.double() @ inverse + mean)
        self.cfg.normalize_activations = "none"


def has_hooks(point: Any) -> bool:
    """Return whether a hook point of TransformerLens has a hook."""
    return bool(point._forward_hooks) or bool(point._backward_hooks)


class KronTopKSAE(KronSAEMixin, LensSAE):  # type: ignore[misc]
    """A KronSAE with TopK, in SAELens."""


class KronJumpReLUSAE(KronSAEMixin, LensSAE):  # type: ignore[misc]
    """A KronSAE with a threshold per latent, in SAELens."""


class _KronTranscoder(KronSAEMixin, LensSAE):  # type: ignore[misc]
    """A KronSAE that writes another hook; ``forward`` adds ``W_skip x`` if there is one."""

    def forward(self, x: Tensor) -> Tensor:
        recons = self.decode(self.encode(x))
        if self.kronsae.skip is None:
            return recons
        skipped: Tensor = self.kronsae.skip(x.to(self.dtype))
        return recons + skipped


class KronTopKTranscoder(_KronTranscoder):
    """A transcoder with TopK, in SAELens."""


class KronJumpReLUTranscoder(_KronTranscoder):
    """A transcoder with a threshold per latent, in SAELens."""


def to_kronsae(sae: Any) -> SAE:
    """Return the SAE of ours inside an SAE of SAELens with one of our architectures; it shares the weights.

    Raises:
        UserError: it has another architecture; save it and read the folder with `kronsae.load`.
    """
    if not isinstance(sae, KronSAEMixin):
        raise UserError(
            f"sae must be an SAE of SAELens with an architecture of kronsae; got {type(sae).__name__}. Save it, and "
            "load the folder with kronsae.load."
        )
    return sae.kronsae.trained()
