"""SAE architectures: functions that return the config of an SAE.

Encoder, sparsifier, loss and experts can be combined freely; each function is a name for one combination. `SAE_KINDS`
maps the first word of a ``--sae`` specification to its function. All functions take the keyword arguments of
`TrainingOptions`; those with a choice of encoder also take `EncoderOptions`. `ARCHITECTURES` lists the architectures,
each as the specification of a small SAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypedDict, Unpack, cast, get_args, get_type_hints

from kronsae.core.checks import check_count
from kronsae.core.encoders import DenseEncoderConfig, EncoderConfig, KroneckerEncoderConfig
from kronsae.core.experts import AnyEncoderConfig, SwitchEncoderConfig
from kronsae.core.gates import GateName
from kronsae.core.losses import LossConfig, MatryoshkaConfig, SquaredErrorConfig, matryoshka_groups
from kronsae.core.normalization import NormalizationName, is_foldable
from kronsae.core.objective import AuxKConfig
from kronsae.core.pursuit import Pursuit, PursuitLearning
from kronsae.core.sparsifiers import BatchTopKConfig, JumpReLUConfig, SparsifierConfig, TopKConfig
from kronsae.core.trunk import TrunkEncoderConfig, check_trunk
from kronsae.kernels import cells_per_head
from kronsae.support.errors import UserError, nearest
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


class TrainingOptions(TypedDict, total=False):
    """Keyword arguments of every function in this module; `TRAINING_DEFAULTS` has their defaults.

    Args:
        name: name of the SAE in its run; default: the name of its kind.
        lr: peak learning rate.
        seed: seed of the initial weights.
        unit_norm_decoder: keep decoder rows at norm 1.
        normalize_activations: None: centre and scale, unless the gate does not allow folding this into the weights
            (`mand_eps`).
        dead_after_tokens: number of tokens without an activation after which a latent is dead.
        aux_weight: weight of the AuxK loss.
        read: hooks read, if not the run's: one name or several (``"layers.2,layers.3"``; a crosscoder).
        write: hooks written, if not the hooks read (a transcoder).
        skip: add a transcoder's linear path ``W_skip x``.
        pursuit_rounds: pursue the codes, in training and afterwards, in so many rounds (`kronsae.core.pursuit`).
        pursuit_candidates, pursuit_refit, pursuit_start: its other settings; defaults as in `Pursuit`.
        pursuit_learning: ``two_losses`` or ``unrolled`` (`kronsae.core.pursuit.PursuitLearning`).
    """

    name: str
    lr: float
    seed: int
    unit_norm_decoder: bool
    normalize_activations: NormalizationName | None
    dead_after_tokens: int
    aux_weight: float
    read: str | tuple[str, ...] | None
    write: str | tuple[str, ...] | None
    skip: bool
    pursuit_rounds: int
    pursuit_candidates: int
    pursuit_refit: int
    pursuit_start: float
    pursuit_learning: PursuitLearning


TRAINING_DEFAULTS: TrainingOptions = {
    "lr": 8e-4,
    "seed": 0,
    "unit_norm_decoder": True,
    "normalize_activations": None,
    "dead_after_tokens": 1_000_000,
    "aux_weight": 1 / 32,
    "read": None,
    "write": None,
    "skip": False,
    "pursuit_learning": "two_losses",
}


class EncoderShape(TypedDict, total=False):
    """Shape of an encoder: dense if only ``d_sae`` is given, otherwise Kronecker. All default to None.

    Args:
        d_sae: number of latents; with a Kronecker encoder it can replace ``num_heads``.
        num_heads: number of heads H.
        d_base: bases per head M.
        d_extension: extensions per head N.
        gate: function that combines a base and an extension; default `mand`.
        init_norm: expected norm of an encoder row at initialisation.
        null_symbols: whether a base or an extension may be absent (`KroneckerEncoderConfig`); default False.
        d_trunk: latents with rows of their own, besides those of the heads (`TrunkEncoderConfig`); default 0.
    """

    d_sae: int | None
    num_heads: int | None
    d_base: int | None
    d_extension: int | None
    gate: GateName
    init_norm: float | None
    null_symbols: bool
    d_trunk: int


class EncoderOptions(EncoderShape, TrainingOptions, total=False):
    """Keyword arguments of `EncoderShape` and `TrainingOptions`."""


def topk(*, d_sae: int, k: int, init_norm: float | None = None, **options: Unpack[TrainingOptions]) -> MemberConfig:
    """Return the config of a TopK SAE with a dense encoder (Gao et al. 2025), the baseline."""
    return _member("topk", DenseEncoderConfig(d_sae=d_sae, init_norm=init_norm), TopKConfig(k=k), options)


def kron(
    *,
    d_base: int,
    d_extension: int,
    k: int,
    num_heads: int | None = None,
    d_sae: int | None = None,
    gate: GateName = "mand",
    init_norm: float | None = None,
    null_symbols: bool = False,
    d_trunk: int = 0,
    **options: Unpack[TrainingOptions],
) -> MemberConfig:
    """Return the config of a KronSAE: ``num_heads`` heads of ``d_base`` bases and ``d_extension`` extensions each.

    Args:
        d_base: bases per head M.
        d_extension: extensions per head N.
        k: active latents per token.
        num_heads: number of heads H; None: the number that gives ``d_sae`` latents.
        d_sae: number of latents; None: ``d_trunk + num_heads * d_base * d_extension``.
        gate: function that combines a base and an extension.
        init_norm: expected norm of an encoder row at initialisation.
        null_symbols: whether a base or an extension may be absent: heads of ``(d_base + 1) * (d_extension + 1) - 1``
            latents.
        d_trunk: latents with rows of their own, besides those of the heads; 0: none, as in the paper.
        **options: see `TrainingOptions`.
    """
    shape: EncoderShape = {
        "d_sae": d_sae,
        "num_heads": num_heads,
        "d_base": d_base,
        "d_extension": d_extension,
        "gate": gate,
        "init_norm": init_norm,
        "null_symbols": null_symbols,
        "d_trunk": d_trunk,
    }
    return _member("kron", _encoder_of(shape), TopKConfig(k=k), options)


def batch_topk(*, k: int, **options: Unpack[EncoderOptions]) -> MemberConfig:
    """Return the config of a BatchTopK SAE, which keeps the B * k largest latents of a batch (Bussmann et al. 2024).

    It is saved as JumpReLU with a learned threshold.

    Args:
        k: mean number of active latents per token.
        **options: see `EncoderShape` and `TrainingOptions`.
    """
    shape, rest = _split(options)
    return _member("batch_topk", _encoder_of(shape), BatchTopKConfig(k=k), rest)


def jumprelu(
    *, k: int, coefficient: float | None = None, bandwidth: float = 0.5, **options: Unpack[EncoderOptions]
) -> MemberConfig:
    """Return the config of a JumpReLU SAE: a learned threshold per latent, l0 penalty (Rajamanoharan et al. 2024b).

    Args:
        k: initial l0; without ``coefficient`` also the target l0, which the weight of the penalty is adjusted to reach.
        coefficient: fixed weight of the l0 penalty.
        bandwidth: bandwidth of the straight-through estimator, as a share of the threshold.
        **options: see `EncoderShape` and `TrainingOptions`.
    """
    shape, rest = _split(options)
    sparsifier, sparsity = JumpReLUConfig(k=k, bandwidth=bandwidth), SparsityConfig(coefficient=coefficient)
    return _member("jumprelu", _encoder_of(shape), sparsifier, rest, sparsity=sparsity)


def matryoshka(
    *,
    k: int,
    smallest: int | None = None,
    groups: tuple[int, ...] | None = None,
    across_batch: bool = False,
    **options: Unpack[EncoderOptions],
) -> MemberConfig:
    """Return the config of a Matryoshka SAE, whose nested prefixes each reconstruct the input (Bussmann et al. 2025).

    Args:
        k: active latents per token.
        smallest: size n of the first group; the group sizes are ``n, n, 2n, 4n, ...``; None: ``d_sae // 8``.
        groups: other group sizes, instead of ``smallest``.
        across_batch: use BatchTopK instead of TopK.
        **options: see `EncoderShape` and `TrainingOptions`.
    """
    shape, rest = _split(options)
    encoder = _encoder_of(shape)
    if groups is None:
        groups = matryoshka_groups(encoder.d_sae, max(1, encoder.d_sae // 8) if smallest is None else smallest)
    elif smallest is not None:
        raise UserError("smallest and groups must not be given together; got both. Leave one out.")
    sparsifier = BatchTopKConfig(k=k) if across_batch else TopKConfig(k=k)
    return _member("matryoshka", encoder, sparsifier, rest, loss=MatryoshkaConfig(groups=groups))


def switch(
    *, k: int, num_experts: int = 8, balance_weight: float = 3.0, **options: Unpack[EncoderOptions]
) -> MemberConfig:
    """Return the config of a Switch SAE: a router selects one of E equal experts per token (Mudide et al. 2025).

    Args:
        k: active latents per token.
        num_experts: number of experts E; latents or heads are divided evenly between them.
        balance_weight: coefficient of the load-balancing loss.
        **options: see `EncoderShape` (for all experts together) and `TrainingOptions`.
    """
    shape, rest = _split(options)
    for what in ("d_sae", "num_heads"):
        whole = shape.get(what)
        if not isinstance(whole, int):
            continue
        if num_experts < 1 or whole % num_experts:
            raise UserError(f"{what} must be a multiple of num_experts; got {whole} with num_experts={num_experts}.")
        shape[what] = whole // num_experts
    expert = _encoder_of(shape)
    if isinstance(expert, TrunkEncoderConfig):
        raise UserError("d_trunk must not be used with experts; got a switch SAE. Leave it out.")
    encoder = SwitchEncoderConfig(num_experts=num_experts, expert=expert, balance_weight=balance_weight)
    return _member("switch", encoder, TopKConfig(k=k), rest)


SAE_KINDS: dict[str, Callable[..., MemberConfig]] = {
    "topk": topk,
    "kron": kron,
    "batch_topk": batch_topk,
    "jumprelu": jumprelu,
    "matryoshka": matryoshka,
    "switch": switch,
}


def keyword_arguments(kind: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the keyword arguments of an SAE's function with their types, and the names of those it requires."""
    function = SAE_KINDS[kind]
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    named = {name: hints[name] for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
    required = tuple(name for name in named if parameters[name].default is inspect.Parameter.empty)
    (options,) = get_args(hints["options"])
    return named | get_type_hints(options), required


def _split(options: EncoderOptions) -> tuple[EncoderShape, TrainingOptions]:
    shape = {name: value for name, value in options.items() if name in EncoderShape.__annotations__}
    rest = {name: value for name, value in options.items() if name not in shape}
    return cast(EncoderShape, shape), cast(TrainingOptions, rest)


def _member(
    kind: str,
    encoder: AnyEncoderConfig,
    sparsifier: SparsifierConfig,
    options: TrainingOptions,
    *,
    loss: LossConfig | None = None,
    sparsity: SparsityConfig | None = None,
) -> MemberConfig:
    for name in options:
        if name not in TrainingOptions.__annotations__:
            known, _ = keyword_arguments(kind)
            raise UserError(f"'{name}' is not an argument of {kind}.{nearest(name, known)}")
    given = TRAINING_DEFAULTS | options
    normalization = given["normalize_activations"]
    if normalization is None:
        normalization = "center_and_scale" if is_foldable(encoder) else "none"
    return MemberConfig(
        name=given.get("name", kind),
        encoder=encoder,
        sparsifier=sparsifier,
        optimizer=OptimizerConfig(lr=given["lr"]),
        aux_k=AuxKConfig(weight=given["aux_weight"], dead_after_tokens=given["dead_after_tokens"]),
        loss=SquaredErrorConfig() if loss is None else loss,
        sparsity=SparsityConfig() if sparsity is None else sparsity,
        unit_norm_decoder=given["unit_norm_decoder"],
        normalize_activations=normalization,
        seed=given["seed"],
        read=_hooks(given["read"]),
        write=_hooks(given["write"]),
        skip=given["skip"],
        pursuit=_pursuit(options),
        pursuit_learning=given["pursuit_learning"],
    )


def _pursuit(options: TrainingOptions) -> Pursuit | None:
    """Return the pursuit that the options ask for: None without any of them."""
    prefix = "pursuit_"
    names = {f"{prefix}{one.name}" for one in fields(Pursuit)}
    given: dict[str, Any] = {name.removeprefix(prefix): value for name, value in options.items() if name in names}
    if given and "rounds" not in given:
        raise UserError(f"{prefix}{next(iter(given))} must be used with pursuit_rounds; give it too, such as 2.")
    return Pursuit(**given) if given else None


def _hooks(given: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return hooks as a tuple; a string contains one hook, or several separated by commas."""
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


def _encoder_of(shape: EncoderShape) -> EncoderConfig | TrunkEncoderConfig:
    """Return the encoder config of this shape: Kronecker if any size of heads is given, otherwise dense."""
    if shape.get("d_trunk", 0):
        return _with_trunk(shape)
    d_sae, init_norm = shape.get("d_sae"), shape.get("init_norm")
    num_heads, d_base, d_extension = shape.get("num_heads"), shape.get("d_base"), shape.get("d_extension")
    gate, null_symbols = shape.get("gate", "mand"), shape.get("null_symbols", False)
    heads = (num_heads, d_base, d_extension)
    if all(value is None for value in heads):
        if d_sae is None:
            raise UserError(
                "d_sae (for a dense encoder) or num_heads, d_base and d_extension (for a Kronecker one) must be given; "
                "got none."
            )
        for name, asked in ((f"gate '{gate}'", gate != "mand"), ("null_symbols", null_symbols)):
            if asked:
                raise UserError(
                    f"{name} must be used with a Kronecker encoder; got a dense one. Leave it out, or give num_heads, "
                    "d_base and d_extension."
                )
        return DenseEncoderConfig(d_sae=d_sae, init_norm=init_norm)
    if num_heads is None and not (d_sae is None or d_base is None or d_extension is None):
        num_heads = _heads(d_sae, d_base, d_extension, null_symbols)
    if num_heads is None or d_base is None or d_extension is None:
        sizes = {"num_heads": num_heads, "d_base": d_base, "d_extension": d_extension}
        given = ", ".join(name for name, size in sizes.items() if size is not None)
        raise UserError(
            f"d_base, d_extension and num_heads (or d_sae) must be given for a Kronecker encoder; got {given}."
        )
    return KroneckerEncoderConfig(
        num_heads=num_heads,
        d_base=d_base,
        d_extension=d_extension,
        d_sae=d_sae,
        gate=gate,
        init_norm=init_norm,
        null_symbols=null_symbols,
    )


def _with_trunk(shape: EncoderShape) -> TrunkEncoderConfig:
    """Return the config of heads with a dense trunk of ``d_trunk`` of the ``d_sae`` latents."""
    d_trunk, d_sae, num_heads = shape["d_trunk"], shape.get("d_sae"), shape.get("num_heads")
    d_base, d_extension = shape.get("d_base"), shape.get("d_extension")
    check_count("d_trunk", d_trunk)
    if d_sae is not None and d_sae <= d_trunk:
        raise UserError(f"d_trunk must be less than d_sae; got {d_trunk} with d_sae={d_sae}. Heads need latents too.")
    if d_base is not None and d_extension is not None:
        cells = cells_per_head(d_base, d_extension, shape.get("null_symbols", False))
        check_trunk(d_trunk, cells)
        if d_sae is not None and num_heads is not None and d_sae != d_trunk + num_heads * cells:
            raise UserError(
                f"d_sae must equal d_trunk + num_heads * {cells} latents of a head; got {d_sae} with {d_trunk} + "
                f"{num_heads} * {cells} = {d_trunk + num_heads * cells}. Leave d_sae out, or change one."
            )
    heads = _encoder_of({**shape, "d_sae": None if d_sae is None else d_sae - d_trunk, "d_trunk": 0})
    if not isinstance(heads, KroneckerEncoderConfig):
        raise UserError(
            "d_trunk must be used with a Kronecker encoder; got a dense one. Leave it out, or give num_heads, d_base "
            "and d_extension."
        )
    trunk = DenseEncoderConfig(d_sae=d_trunk, init_norm=shape.get("init_norm"))
    return TrunkEncoderConfig(trunk=trunk, heads=heads)


def _heads(d_sae: int, d_base: int, d_extension: int, null_symbols: bool) -> int:
    """Return the number of heads that gives ``d_sae`` latents."""
    for what, size in (("d_sae", d_sae), ("d_base", d_base), ("d_extension", d_extension)):
        check_count(what, size)
    cells = cells_per_head(d_base, d_extension, null_symbols)
    heads, rest = divmod(d_sae, cells)
    if rest:
        formula, numbers = "d_base * d_extension", f"{d_base} * {d_extension}"
        if null_symbols:
            formula = "(d_base + 1) * (d_extension + 1) - 1, because of null_symbols"
            numbers = f"{d_base + 1} * {d_extension + 1} - 1"
        raise UserError(
            f"without num_heads, d_sae must be a multiple of {formula}; got {d_sae} with {numbers} = {cells}. "
            "Change one."
        )
    return heads
