"""The SAEs of the comparison: each function describes one.

Encoder, sparsifier, loss and experts combine freely; a function here is only a name for one combination, and
`SAE_KINDS` gives each the word that ``--sae`` begins with. All of them take ``read`` and ``write``, the hooks read and
written where these are not the run's: one name or several (``"layers.2,layers.3"``), which makes a transcoder or a
crosscoder of any of them, and ``skip`` for a transcoder's linear path. `ARCHITECTURES` holds the cells of the
comparison, each as the ``--sae`` words that train it small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kronsae.core.checks import check_count
from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.losses import LossConfig, MatryoshkaConfig, SquaredErrorConfig, matryoshka_groups
from kronsae.core.normalization import NormalizationName, is_foldable
from kronsae.core.objective import AuxKConfig
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.support.errors import UserError
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
    "transcoder": "topk d_sae=1024 k=16 read=layers.3.mlp:input write=layers.3.mlp",
    "transcoder-kron": "kron num_heads=128 d_base=2 d_extension=4 k=16 read=layers.3.mlp:input write=layers.3.mlp",
    "skip_transcoder": "topk d_sae=1024 k=16 read=layers.3.mlp:input write=layers.3.mlp skip=true",
    "skip_transcoder-kron": "kron num_heads=128 d_base=2 d_extension=4 k=16 read=layers.3.mlp:input "
    "write=layers.3.mlp skip=true",
    "crosscoder": "topk d_sae=1024 k=16 read=layers.2,layers.3",
    "crosscoder-kron": "kron num_heads=128 d_base=2 d_extension=4 k=16 read=layers.2,layers.3",
}


def topk(
    *,
    d_sae: int,
    k: int,
    name: str = "topk",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """A TopK SAE with a dense encoder (Gao et al. 2025): the baseline."""
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(DenseEncoderConfig(d_sae=d_sae, init_norm=init_norm), TopKConfig(k=k), training, places)


def kron(
    *,
    d_base: int,
    d_extension: int,
    k: int,
    num_heads: int | None = None,
    d_sae: int | None = None,
    gate: GateName = "mand",
    name: str = "kron",
    lr: float = 8e-4,
    seed: int = 0,
    init_norm: float | None = None,
    unit_norm_decoder: bool = True,
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """A KronSAE: ``num_heads`` heads, each composing ``d_base`` bases with ``d_extension`` extensions.

    Args:
        d_base: M.
        d_extension: N.
        k: latents per token.
        num_heads: H; left out, as many as make ``d_sae`` latents.
        d_sae: latents; left out, ``num_heads * d_base * d_extension``.
        gate: how a base and an extension compose.
        normalize_activations: here and in the other functions None centres and scales where the gate allows it to be
            folded away, so not for `mand_eps`.
    """
    encoder = _encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm)
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(encoder, TopKConfig(k=k), training, places)


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
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """The B * k largest latents of each batch; saved as JumpReLU with a learned threshold (Bussmann et al. 2024).

    Args:
        k: latents per token, on average.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead; ``d_sae`` may stand for ``num_heads``.
    """
    encoder = _encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm)
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(encoder, BatchTopKConfig(k=k), training, places)


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
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """A learned threshold per latent, under an l0 penalty (Rajamanoharan et al. 2024b).

    Args:
        k: l0 to start with and, without ``coefficient``, to end with: the penalty is steered towards it.
        coefficient: fixed weight of the l0 penalty.
        bandwidth: of the straight-through estimator, as a share of the threshold.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead; ``d_sae`` may stand for ``num_heads``.
    """
    encoder = _encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm)
    sparsifier, sparsity = JumpReLUConfig(k=k, bandwidth=bandwidth), SparsityConfig(coefficient=coefficient)
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(encoder, sparsifier, training, places, sparsity=sparsity)


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
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """Nested prefixes of the dictionary that each reconstruct on their own (Bussmann et al. 2025).

    Args:
        k: latents per token.
        smallest: size of the first group, of ``2^k, 2^k, 2^(k+1), ...``; None: ``d_sae // 8``.
        groups: any other group sizes, in place of ``smallest``.
        across_batch: BatchTopK in place of TopK.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead; ``d_sae`` may stand for ``num_heads``.
    """
    encoder = _encoder(d_sae, num_heads, d_base, d_extension, gate, init_norm)
    if groups is None:
        groups = matryoshka_groups(encoder.d_sae, max(1, encoder.d_sae // 8) if smallest is None else smallest)
    elif smallest is not None:
        raise UserError("give smallest or groups, not both.")
    sparsifier = BatchTopKConfig(k=k) if across_batch else TopKConfig(k=k)
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(encoder, sparsifier, training, places, loss=MatryoshkaConfig(groups=groups))


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
    normalize_activations: NormalizationName | None = None,
    dead_after_tokens: int = 1_000_000,
    aux_weight: float = 1 / 32,
    read: str | tuple[str, ...] | None = None,
    write: str | tuple[str, ...] | None = None,
    skip: bool = False,
) -> MemberConfig:
    """Experts of equal size, of which a router picks one per token (Mudide et al. 2025).

    Args:
        k: latents per token.
        num_experts: E; they share the latents, or the heads, evenly.
        balance_weight: coefficient of the load-balancing loss.
        d_sae: latents, for a dense encoder.
        num_heads, d_base, d_extension, gate: for a Kronecker encoder instead; ``d_sae`` may stand for ``num_heads``.
    """
    for what, whole in (("d_sae", d_sae), ("num_heads", num_heads)):
        if whole is not None and (num_experts < 1 or whole % num_experts):
            raise UserError(f"{what} must be a multiple of num_experts; got {whole} with num_experts={num_experts}.")
    own_latents, own_heads = (None if whole is None else whole // num_experts for whole in (d_sae, num_heads))
    expert = _encoder(own_latents, own_heads, d_base, d_extension, gate, init_norm)
    encoder = SwitchEncoderConfig(num_experts=num_experts, expert=expert, balance_weight=balance_weight)
    training = _Training(name, lr, seed, unit_norm_decoder, normalize_activations, dead_after_tokens, aux_weight)
    places = _Places(read, write, skip)
    return _member(encoder, TopKConfig(k=k), training, places)


SAE_KINDS: dict[str, Callable[..., MemberConfig]] = {
    "topk": topk,
    "kron": kron,
    "batch_topk": batch_topk,
    "jumprelu": jumprelu,
    "matryoshka": matryoshka,
    "switch": switch,
}


class _Training(NamedTuple):
    """The words that mean the same for every SAE."""

    name: str
    lr: float
    seed: int
    unit_norm_decoder: bool
    normalize_activations: NormalizationName | None
    dead_after_tokens: int
    aux_weight: float


class _Places(NamedTuple):
    """Where an SAE belongs, as it may be written: one hook, several with commas between them, or a tuple."""

    read: str | tuple[str, ...] | None
    write: str | tuple[str, ...] | None
    skip: bool

    @staticmethod
    def hooks(given: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        """As a config keeps them."""
        return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


def _member(
    encoder: AnyEncoderConfig,
    sparsifier: SparsifierConfig,
    training: _Training,
    places: _Places,
    *,
    loss: LossConfig | None = None,
    sparsity: SparsityConfig | None = None,
) -> MemberConfig:
    normalization = training.normalize_activations
    if normalization is None:
        normalization = "center_and_scale" if is_foldable(encoder) else "none"
    return MemberConfig(
        name=training.name,
        encoder=encoder,
        sparsifier=sparsifier,
        optimizer=OptimizerConfig(lr=training.lr),
        aux_k=AuxKConfig(weight=training.aux_weight, dead_after_tokens=training.dead_after_tokens),
        loss=SquaredErrorConfig() if loss is None else loss,
        sparsity=SparsityConfig() if sparsity is None else sparsity,
        unit_norm_decoder=training.unit_norm_decoder,
        normalize_activations=normalization,
        seed=training.seed,
        read=places.hooks(places.read),
        write=places.hooks(places.write),
        skip=places.skip,
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
        if gate != "mand":
            raise UserError(
                f"gate is for a Kronecker encoder; got '{gate}' with a dense one. Leave it out, or give heads."
            )
        return DenseEncoderConfig(d_sae=d_sae, init_norm=init_norm)
    if num_heads is None and not (d_sae is None or d_base is None or d_extension is None):
        num_heads = _heads(d_sae, d_base, d_extension)
    if num_heads is None or d_base is None or d_extension is None:
        raise UserError("a Kronecker encoder needs d_base, d_extension and num_heads (or d_sae in its place).")
    return KroneckerEncoderConfig(
        num_heads=num_heads, d_base=d_base, d_extension=d_extension, d_sae=d_sae, gate=gate, init_norm=init_norm
    )


def _heads(d_sae: int, d_base: int, d_extension: int) -> int:
    """The heads that make ``d_sae`` latents."""
    for what, size in (("d_sae", d_sae), ("d_base", d_base), ("d_extension", d_extension)):
        check_count(what, size)
    heads, rest = divmod(d_sae, d_base * d_extension)
    if rest:
        raise UserError(
            f"without num_heads, d_sae must be a multiple of d_base * d_extension; got {d_sae} with {d_base} * "
            f"{d_extension} = {d_base * d_extension}. Change one."
        )
    return heads
