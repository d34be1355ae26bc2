"""An SAE as SAEBench (sae-bench 0.6.0) expects one; nothing of SAEBench is imported.

SAEBench takes any object with ``W_dec``, ``W_enc``, ``b_enc``, ``b_dec``, ``device``, ``dtype``, ``encode`` (dense),
`decode`, ``forward``, ``to`` and a mutable dataclass ``cfg`` with ``to_dict``. It compares latents by their activation
times the cosine of their direction, and therefore wants decoder rows of norm 1.

A factorised encoder has no matrix ``W_enc``: its latent (h, i, j) is ``gate(P_hi x + b_hi, Q_hj x + b_hj)``. What it
has instead is in `parents`. SAEBench 0.6.0 reads ``W_enc`` in two evaluations: ``absorption``, for a table of cosines
beside its result, and ``core``, for norms and cosines of the encoder. All others need ``encode`` and ``W_dec`` alone.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kronsae.core.encoders import DenseEncoder, KroneckerEncoder
from kronsae.core.sae import SAE
from kronsae.core.sparsifiers import JumpReLU
from kronsae.interop.hook_names import to_transformer_lens
from kronsae.support.errors import UserError

LINEAR_ONLY = ("W_enc", "b_enc")
"""Attributes that only an SAE with a linear encoder has."""


class NoLinearEncoder(UserError, AttributeError):
    """``W_enc`` or ``b_enc`` of an encoder that is no linear map; `hasattr` is False."""


@dataclass
class SAEBenchConfig:
    """What SAEBench reads from an SAE's ``cfg``; it adds attributes of its own, so this is not frozen.

    Args:
        model_name: language model, as it stands in the results.
        d_in: width of the activations.
        d_sae: number of latents.
        hook_layer: transformer block of the hook.
        hook_name: hook in TransformerLens' names, such as ``blocks.3.hook_resid_post``.
        architecture: ours, such as ``kronecker-topk``.
        context_size: length of the sequences that the SAE was trained on; None: not known.
        dtype, device: of the SAE, kept up to date by `SAEBenchSAE.to`.
        dataset_path: text that the SAE was trained on; ``""``: not known.
        training_tokens: tokens that it was trained on; -1: not known.
    """

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    context_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    dataset_path: str = ""
    training_tokens: int = -1
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without what SAEBench added."""
        return asdict(self)


@dataclass(frozen=True)
class Parents:
    """What a Kronecker encoder has in place of ``W_enc``.

    Args:
        W_base: ``[H, M, D]``, the rows of the bases.
        W_extension: ``[H, N, D]``, the rows of the extensions.
        b_base: ``[H, M]``, their biases.
        b_extension: ``[H, N]``.
        base_cosine: ``[F]``, cosine of each latent's direction in the decoder with the row of its base.
        extension_cosine: ``[F]``, with the row of its extension.
    """

    W_base: Float[Tensor, "H M D"]
    W_extension: Float[Tensor, "H N D"]
    b_base: Float[Tensor, "H M"]
    b_extension: Float[Tensor, "H N"]
    base_cosine: Float[Tensor, " F"]
    extension_cosine: Float[Tensor, " F"]


@torch.no_grad()
def parents(sae: SAE) -> Parents:
    """Return the parents' rows of a Kronecker SAE, and their cosines with the decoder's directions.

    Raises:
        UserError: the encoder is not a Kronecker encoder, or has null symbols.
    """
    encoder = sae.encoder
    if not isinstance(encoder, KroneckerEncoder):
        raise UserError(f"parents exist in Kronecker encoders; this SAE is {sae.config.architecture}. Read W_enc.")
    if encoder.null_symbols:
        raise UserError(
            "sae must not have null symbols, with which a latent may have only one parent; it has. Read its encoder's "
            "W_base and W_extension."
        )
    W_dec_HMND = sae.W_dec.view(encoder.num_heads, encoder.d_base, encoder.d_extension, -1)
    return Parents(
        W_base=encoder.W_base,
        W_extension=encoder.W_extension,
        b_base=encoder.bias[:, : encoder.d_base],
        b_extension=encoder.bias[:, encoder.d_base :],
        base_cosine=cosine_similarity(W_dec_HMND, encoder.W_base.unsqueeze(2), dim=-1).flatten(),
        extension_cosine=cosine_similarity(W_dec_HMND, encoder.W_extension.unsqueeze(1), dim=-1).flatten(),
    )


class SAEBenchSAE(nn.Module):
    """An SAE of ours under SAEBench's names: same reconstructions, decoder rows of norm 1.

    With ``n_i = |W_dec_i|``, the rows are ``W_dec_i / n_i`` and the activations ``n_i f_i``, so `decode` of `encode`
    does not change. A row of norm 0 stays. A dense encoder gives ``W_enc [D, F]`` and ``b_enc [F]`` with columns
    ``n_i W_enc_i``: ``relu(x W_enc + b_enc)`` of the selected latents is what `encode` returns.

    Args:
        sae: the SAE; it is used as it is, not copied. A pursuit stays in use.
        cfg: what SAEBench has to know of it.
        placeholder: give ``W_enc`` and ``b_enc`` full of NaN where there are none, instead of raising: for code that
            reads ``W_enc`` for a table beside its result. Whatever is computed from it is NaN too.

    Raises:
        UserError: the SAE is a transcoder or a crosscoder, which SAEBench does not measure.
    """

    W_dec: Tensor
    b_dec: Tensor
    norms: Tensor

    def __init__(self, sae: SAE, cfg: SAEBenchConfig, *, placeholder: bool = False) -> None:
        super().__init__()
        if not sae.config.autoencodes or len(sae.config.widths_read) > 1:
            raise UserError(
                f"sae must read one hook and reconstruct it: SAEBench measures nothing else; got "
                f"{sae.config.architecture}. Choose an SAE that is neither a transcoder nor a crosscoder."
            )
        self.sae, self.cfg, self.placeholder = sae, cfg, placeholder
        with torch.no_grad():
            norms_F = sae.W_dec.norm(dim=1)
            norms_F = torch.where(norms_F > 0, norms_F, 1.0)
            self.register_buffer("norms", norms_F)
            self.W_dec = nn.Parameter(sae.W_dec / norms_F.unsqueeze(1))
            self.b_dec = nn.Parameter(sae.b_dec.clone())
        cfg.d_in, cfg.d_sae, cfg.architecture = sae.d_in, sae.d_sae, sae.config.architecture
        cfg.activation_fn_str = "relu" if isinstance(sae.sparsifier, JumpReLU) else "topk"
        cfg.activation_fn_kwargs = {} if cfg.activation_fn_str == "relu" else {"k": sae.sparsifier.config.k}
        self._describe()

    def __getattr__(self, name: str) -> Any:
        if name in LINEAR_ONLY:
            return self._linear(name)
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of what `encode` returns."""
        return self.W_dec.dtype

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Return the activations of all latents, dense, in the SAE's dtype; 0 where a latent is not active."""
        codes = self.sae.encode(x.to(self.dtype))
        dense: Tensor = codes.to_dense() * self.norms
        return dense

    def decode(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... D"]:
        """Return the reconstruction from dense activations, as `encode` gives them or changed."""
        x_hat: Tensor = feature_acts.to(self.dtype) @ self.W_dec + self.b_dec
        return x_hat

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return ``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchSAE:
        """Move or cast, as any module, and keep ``cfg`` up to date."""
        super().to(*args, **kwargs)
        self._describe()
        return self

    def fold_W_dec_norm(self) -> None:
        """Do nothing: the decoder's rows have norm 1."""

    def _describe(self) -> None:
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)

    @torch.no_grad()
    def _linear(self, name: str) -> Tensor:
        encoder = self.sae.encoder
        if isinstance(encoder, DenseEncoder):
            return encoder.weight.T * self.norms if name == "W_enc" else encoder.bias * self.norms
        if self.placeholder:
            size = (self.sae.d_in, self.sae.d_sae) if name == "W_enc" else (self.sae.d_sae,)
            return torch.full(size, torch.nan, dtype=self.dtype, device=self.device)
        instead = (
            "kronsae.interop.saebench.parents(sae) gives the rows of each latent's two parents, W_base and "
            "W_extension, and their cosines with its direction"
            if isinstance(encoder, KroneckerEncoder)
            else "its experts have rows of their own, in sae.encoder.experts"
        )
        raise NoLinearEncoder(
            f"{name} exists only for linear encoders; a latent of this {self.sae.config.architecture} SAE is no linear "
            f"function of x before its activation function. Use encode and W_dec; {instead}."
        )


def transformer_lens_hook(hook: str) -> tuple[str, int]:
    """Return the name and the layer that TransformerLens gives to the output of a transformer block.

    Args:
        hook: module path or layer, such as ``layers.3``, ``gpt_neox.layers.3``, ``3``, or TransformerLens' own
            ``blocks.3.hook_resid_post``. An attention or MLP module has no name of the same meaning in every
            architecture and is not accepted.

    Raises:
        UserError: the hook is neither.
    """
    name = to_transformer_lens(hook)
    place = re.fullmatch(r"blocks\.(\d+)\.[a-z_.]+", name)
    if place is None or (name != hook and not name.endswith(".hook_resid_post")):
        raise UserError(
            f"hook must be the output of a transformer block, such as layers.3, or a name of TransformerLens, such as "
            f"blocks.3.hook_mlp_out; got '{hook}'."
        )
    return name, int(place[1])
