"""The SAEs of the comparison beyond TopK: each function describes one, with a dense or a Kronecker encoder.

Encoder, sparsifier, loss and experts combine freely; a function here is only a name for one combination.
`ARCHITECTURES` holds the ten cells of the comparison, each as the ``--sae`` words that train it small.
"""

from __future__ import annotations

from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import SwitchEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.losses import MatryoshkaConfig, matryoshka_groups
from kronsae.core.normalization import NormalizationName
from kronsae.core.objective import AuxKConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, TopKConfig
from kronsae.errors import UserError
from kronsae.training.config import MemberConfig, OptimizerConfig
from kronsae.training.sparsity import SparsityConfig

ARCHITECTURES: dict[str, str] = {
    "topk": "topk d_sae=1024 k=16",
    "topk-kron": "kron num_heads=128 d_base=2 d_extension=4 k=16",
    "batch_topk": "batch_topk d_sae=1024 k=16",
    "batch_topk-kron": "batch_topk num_heads=128 d_base=2 d_extension=4 k=16",
    "jumprelu": "jumprelu d_sae=1024 k=16",
    "jumprelu-kron": "jumprelu num_heads=128 d_base=2 d_extension=4 k=16",
    "matryoshka": "matryoshka d_sae=1024 k=16 smallest=128",
    "matryoshka-kron": "matryoshka num_heads=128 d_base=2 d_extension=4 k=16 smallest=128",
    "switch": "switch d_sae=1024 k=16 num_experts=8",
    "switch-kron": "switch num_heads=128 d_base=2 d_extension=4 k=16 num_experts=8",
}


def batch_topk(
    *,
    k: int,
    d_sae: int | None = None,
    num_heads: int | None = None,
    d_base: int | None = None,
    d_extension: int | None = None,
    gate: GateName = "mand",
    name: str = "batch_topk",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName = "center_and_scale",
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
) -> MemberConfig:
    """The B * k largest latents of each batch; saved as JumpReLU with a learned threshold (Bussmann et al. 2024).

    Args:
        k: latents per token, on average.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead.
    """
    return MemberConfig(
        name=name,
        encoder=_encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm),
        sparsifier=BatchTopKConfig(k=k),
        optimizer=OptimizerConfig(lr=lr),
        aux_k=AuxKConfig(weight=aux_weight, dead_after_tokens=dead_after_tokens),
        unit_norm_decoder=unit_norm_decoder,
        normalize_activations=normalize_activations,
        seed=seed,
    )


def jumprelu(
    *,
    k: int,
    coefficient: float | None = None,
    bandwidth: float = 0.5,
    d_sae: int | None = None,
    num_heads: int | None = None,
    d_base: int | None = None,
    d_extension: int | None = None,
    gate: GateName = "mand",
    name: str = "jumprelu",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName = "center_and_scale",
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
) -> MemberConfig:
    """A learned threshold per latent, under an l0 penalty (Rajamanoharan et al. 2024b).

    Args:
        k: l0 to start with and, without ``coefficient``, to end with: the penalty is steered towards it.
        coefficient: fixed weight of the l0 penalty.
        bandwidth: of the straight-through estimator, as a share of the threshold.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead.
    """
    return MemberConfig(
        name=name,
        encoder=_encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm),
        sparsifier=JumpReLUConfig(k=k, bandwidth=bandwidth),
        sparsity=SparsityConfig(coefficient=coefficient),
        optimizer=OptimizerConfig(lr=lr),
        aux_k=AuxKConfig(weight=aux_weight, dead_after_tokens=dead_after_tokens),
        unit_norm_decoder=unit_norm_decoder,
        normalize_activations=normalize_activations,
        seed=seed,
    )


def matryoshka(
    *,
    k: int,
    smallest: int | None = None,
    groups: tuple[int, ...] | None = None,
    across_batch: bool = False,
    d_sae: int | None = None,
    num_heads: int | None = None,
    d_base: int | None = None,
    d_extension: int | None = None,
    gate: GateName = "mand",
    name: str = "matryoshka",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName = "center_and_scale",
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
) -> MemberConfig:
    """Nested prefixes of the dictionary that each reconstruct on their own (Bussmann et al. 2025).

    Args:
        k: latents per token.
        smallest: size of the first group, of ``2^k, 2^k, 2^(k+1), ...``; None: ``d_sae // 8``.
        groups: any other group sizes, in place of ``smallest``.
        across_batch: BatchTopK in place of TopK.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead.
    """
    encoder = _encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm)
    if groups is None:
        groups = matryoshka_groups(encoder.d_sae, max(1, encoder.d_sae // 8) if smallest is None else smallest)
    elif smallest is not None:
        raise UserError("give smallest or groups, not both.")
    return MemberConfig(
        name=name,
        encoder=encoder,
        sparsifier=BatchTopKConfig(k=k) if across_batch else TopKConfig(k=k),
        loss=MatryoshkaConfig(groups=groups),
        optimizer=OptimizerConfig(lr=lr),
        aux_k=AuxKConfig(weight=aux_weight, dead_after_tokens=dead_after_tokens),
        unit_norm_decoder=unit_norm_decoder,
        normalize_activations=normalize_activations,
        seed=seed,
    )


def switch(
    *,
    k: int,
    num_experts: int = 8,
    balance_weight: float = 3.0,
    d_sae: int | None = None,
    num_heads: int | None = None,
    d_base: int | None = None,
    d_extension: int | None = None,
    gate: GateName = "mand",
    name: str = "switch",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName = "center_and_scale",
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
) -> MemberConfig:
    """Experts of equal size, of which a router picks one per token (Mudide et al. 2025).

    Args:
        k: latents per token.
        num_experts: E; they share the latents, or the heads, evenly.
        balance_weight: coefficient of the load-balancing loss.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead.
    """
    for what, whole in (("d_sae", d_sae), ("num_heads", num_heads)):
        if whole is not None and (num_experts < 1 or whole % num_experts):
            raise UserError(f"{what} must be a multiple of num_experts; got {whole} with num_experts={num_experts}.")
    own_latents, own_heads = (None if whole is None else whole // num_experts for whole in (d_sae, num_heads))
    expert = _encoder(own_latents, own_heads, d_base, d_extension, gate, init_norm)
    return MemberConfig(
        name=name,
        encoder=SwitchEncoderConfig(num_experts=num_experts, expert=expert, balance_weight=balance_weight),
        sparsifier=TopKConfig(k=k),
        optimizer=OptimizerConfig(lr=lr),
        aux_k=AuxKConfig(weight=aux_weight, dead_after_tokens=dead_after_tokens),
        unit_norm_decoder=unit_norm_decoder,
        normalize_activations=normalize_activations,
        seed=seed,
    )


def _encoder(
    d_sae: int | None,
    num_heads: int | None,
    d_base: int | None,
    d_extension: int | None,
    gate: GateName,
    init_norm: float | None,
) -> EncoderConfig:
    """The encoder that the words given describe: Kronecker if they name heads, else dense."""
    heads = (num_heads, d_base, d_extension)
    if all(value is None for value in heads):
        if d_sae is None:
            raise UserError("give d_sae for a dense encoder, or num_heads, d_base and d_extension for a Kronecker one.")
        return DenseEncoderConfig(d_sae=d_sae, init_norm=init_norm)
    if num_heads is None or d_base is None or d_extension is None:
        raise UserError("a Kronecker encoder needs num_heads, d_base and d_extension, all three.")
    return KroneckerEncoderConfig(
        num_heads=num_heads,
        d_base=d_base,
        d_extension=d_extension,
        d_sae=0 if d_sae is None else d_sae,
        gate=gate,
        init_norm=init_norm,
    )
