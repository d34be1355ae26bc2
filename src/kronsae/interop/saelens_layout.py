"""How a KronSAE lies in a folder of SAELens: architecture names, config fields and tensor names.

SAELens has no architecture with a factorised encoder, so these are ours; `kronsae.interop.saelens` registers them. What
is stated here holds for the folders, without SAELens: the reader, the writer and the registration share it.

=============================  ===========================================================
architecture                   SAE
=============================  ===========================================================
kronsae_topk                   Kronecker encoder, TopK
kronsae_jumprelu               Kronecker encoder, a threshold per latent
kronsae_topk_transcoder        the same, writing another hook; with ``skip``, ``W_skip x``
kronsae_jumprelu_transcoder
kronsae_batchtopk              checkpoints of trainings; finished, they are saved as
kronsae_matryoshka_batchtopk   ``kronsae_jumprelu``
=============================  ===========================================================

Config fields besides those of SAELens: ``d_base``, ``d_extension``, ``gate``, ``k``, and ``d_out`` and ``skip`` of a
transcoder. The number of heads is ``d_sae / (d_base * d_extension)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.core.encoders import KroneckerEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.sae import SAEConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.support.errors import UserError, shown

SPARSIFIERS: dict[str, type[SparsifierConfig]] = {
    "kronsae_topk": TopKConfig,
    "kronsae_jumprelu": JumpReLUConfig,
    "kronsae_topk_transcoder": TopKConfig,
    "kronsae_jumprelu_transcoder": JumpReLUConfig,
    "kronsae_batchtopk": BatchTopKConfig,
    "kronsae_matryoshka_batchtopk": BatchTopKConfig,
}
"""Our architectures in SAELens, and the sparsifier of each."""

TRANSCODERS = ("kronsae_topk_transcoder", "kronsae_jumprelu_transcoder")

TENSORS = {
    "decoder.W_dec": "W_dec",
    "decoder.b_dec": "b_dec",
    "skip.W_skip": "W_skip",
    "sparsifier.log_threshold": "log_threshold",
}
"""Names in our state dict, and in a file of SAELens where they differ."""


def architecture_of(config: SAEConfig) -> str | None:
    """Return the architecture of a finished SAE with a Kronecker encoder; None if there is none for it."""
    encoder = config.encoder
    if not isinstance(encoder, KroneckerEncoderConfig) or encoder.null_symbols or config.pursuit is not None:
        return None
    if config.role not in ("", "transcoder", "skip_transcoder"):
        return None
    name = f"kronsae_{config.sparsifier.kind}{'_transcoder' if config.role else ''}"
    return name if name in SPARSIFIERS else None


def kron_config(
    architecture: str,
    *,
    d_in: int,
    d_sae: int,
    d_base: int,
    d_extension: int,
    gate: GateName,
    k: int,
    d_out: int | None = None,
    skip: bool = False,
) -> SAEConfig:
    """Return the config of an SAE with one of our architectures.

    Args:
        architecture: a key of `SPARSIFIERS`.
        d_in, d_sae: widths.
        d_base, d_extension, gate: shape of the heads; their number follows from d_sae.
        k: active latents per token, on average where there are thresholds.
        d_out: width of the output of a transcoder; None: an SAE.
        skip: whether a transcoder adds ``W_skip x``.

    Raises:
        UserError: the sizes do not fit.
    """
    for name, size in (("d_sae", d_sae), ("d_base", d_base), ("d_extension", d_extension)):
        check_count(name, size)
    heads, rest = divmod(d_sae, d_base * d_extension)
    if rest or not heads:
        raise UserError(
            f"d_sae must be a multiple of d_base * d_extension; got {shown(d_sae)} with {shown(d_base)} * "
            f"{shown(d_extension)}. Change one."
        )
    return SAEConfig(
        d_in=d_in,
        encoder=KroneckerEncoderConfig(num_heads=heads, d_base=d_base, d_extension=d_extension, gate=gate),
        sparsifier=SPARSIFIERS[architecture](k=k),
        write_widths=() if d_out is None else (d_out,),
        skip=skip,
    )


def to_disk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours under the names of a file of SAELens."""
    return {TENSORS.get(name, name): tensor for name, tensor in weights.items()}


def from_disk(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors of a file of SAELens under the names of our state dict."""
    ours = {there: here for here, there in TENSORS.items()}
    return {ours.get(name, name): tensor for name, tensor in weights.items()}


def kron_fields(config: SAEConfig) -> dict[str, Any]:
    """Return the config fields of an SAE with one of our architectures, besides those of SAELens."""
    encoder = config.encoder
    assert isinstance(encoder, KroneckerEncoderConfig)
    fields: dict[str, Any] = {
        "d_base": encoder.d_base,
        "d_extension": encoder.d_extension,
        "gate": encoder.gate,
        "k": config.sparsifier.k,
    }
    return fields if config.autoencodes else fields | {"d_out": config.d_out, "skip": config.skip}
