"""Encoders turn x into lazy latents: only the latents that a sparsifier selects are computed with a gradient.

The product ``x W^T`` is computed in chunks of tokens, without a graph. Only the pre-latents of the selected latents are
kept and receive a gradient. One step therefore stores O(K) numbers per token, and the backward pass reads O(K) rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kronsae import kernels
from kronsae.core.checks import check_count, check_positive
from kronsae.core.codes import SparseCodes
from kronsae.core.gates import GATES, Gate, GateName, excess
from kronsae.kernels import Above, BatchChoice, Choice, Composition, Request
from kronsae.support.errors import UserError
from kronsae.support.tensors import aligned


@runtime_checkable
class Latents(Protocol):
    """Lazy activations of all F latents on a batch, before sparsification."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, B."""
        ...

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        """Sparse codes for each request; differentiable.

        A request asks for the k largest latents per token (of all latents, or of a subset: AuxK asks for the dead
        ones), for the largest of the whole batch, or for all above a threshold. Several requests share one product.
        """
        ...

    def materialize(self) -> Float[Tensor, "B F"]:
        """All F activations by their definition, with plain autograd: the reference for tests of `choose`."""
        ...

    def penalty(self) -> Float[Tensor, ""] | None:
        """Weighted loss term of the encoder itself on this batch; None: no such term."""
        ...


class Ranked(NamedTuple):
    """Codes, and the numbers by which they were selected: of two latents, that of the larger ``rank`` comes first.

    A rank is the activation, or increases with it; several ranks may be rounded to one activation. Of equal ranks the
    earlier token comes first, then the smaller latent. Padding has rank 0.
    """

    codes: SparseCodes
    rank_BK: Float[Tensor, "B K"]

    def none(self) -> Ranked:
        """Codes without columns."""
        codes = SparseCodes(self.codes.values[:, :0], self.codes.indices[:, :0], self.codes.d_sae)
        return Ranked(codes, self.rank_BK[:, :0])


@runtime_checkable
class RankedLatents(Latents, Protocol):
    """Latents that also say how they rank, which merges selections from parts of a dictionary or of a batch."""

    def choose_ranked(self, *requests: Request) -> tuple[Ranked, ...]:
        """Result of `choose`, with ranks."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Interface that `SAE` requires of its encoder."""

    d_in: int
    d_sae: int

    def __call__(self, x_BD: Float[Tensor, "B D"]) -> Latents: ...

    def initialize(self, generator: torch.Generator) -> None: ...

    def initial_decoder_rows(self) -> Float[Tensor, "F D"]: ...

    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights for raw x instead of ``(x - mean) / scale``, with latents scaled by ``latent_scale``."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenseEncoderConfig:
    """Config of a dense encoder: one row of weights per latent.

    Args:
        d_sae: F, latents in the dictionary.
        init_norm: expected norm of an encoder row at initialisation; None: ``sqrt(d_in / (2 * d_sae))``, as in the
            paper.
    """

    kind: ClassVar[str] = "dense"
    d_sae: int
    init_norm: float | None = None

    def __post_init__(self) -> None:
        check_count("d_sae", self.d_sae)
        check_positive("init_norm", self.init_norm)

    def build(self, d_in: int) -> DenseEncoder:
        """Return the encoder for inputs of width ``d_in``, not yet initialised."""
        return DenseEncoder(self, d_in)

    @property
    def block(self) -> int:
        """Smallest number of latents that a group boundary may not split: 1."""
        return 1

    @property
    def latents_per_token(self) -> int:
        """Largest number of latents that one token can activate."""
        return self.d_sae

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass: ``D * F`` (paper, eq. 7)."""
        return d_in * self.d_sae


@dataclass(frozen=True, kw_only=True, init=False)
class KroneckerEncoderConfig:
    """Config of H heads, each the Kronecker product of M bases and N extensions; ``d_sae = H * M * N``.

    Args:
        num_heads: H.
        d_base: M, bases per head.
        d_extension: N, extensions per head.
        d_sae: computed from the three sizes, also by ``dataclasses.replace``; if given, it must agree with them.
        gate: how a base and an extension compose: a name in `kronsae.core.gates.GATES`.
        init_norm: expected norm of a pre-latent's row at initialisation; None: ``sqrt(d_in / (2 * d_sae))``.
        null_symbols: a base or an extension may be absent, which gives M + N latents more per head from the same rows
            (`KroneckerEncoder`): ``d_sae = H * ((M + 1)(N + 1) - 1)``; only with gate `mand`.
    """

    kind: ClassVar[str] = "kronecker"
    num_heads: int
    d_base: int
    d_extension: int
    d_sae: int = field(init=False, default=0)
    gate: GateName = "mand"
    init_norm: float | None = None
    null_symbols: bool = False

    def __init__(
        self,
        *,
        num_heads: int,
        d_base: int,
        d_extension: int,
        d_sae: int | None = None,
        gate: GateName = "mand",
        init_norm: float | None = None,
        null_symbols: bool = False,
    ) -> None:
        for name, size in (("num_heads", num_heads), ("d_base", d_base), ("d_extension", d_extension)):
            check_count(name, size)
        check_positive("init_norm", init_norm)
        total = num_heads * kernels.cells_per_head(d_base, d_extension, null_symbols)
        formula, numbers = "num_heads * d_base * d_extension", f"{num_heads} * {d_base} * {d_extension}"
        if null_symbols:
            formula = "num_heads * ((d_base + 1) * (d_extension + 1) - 1) with null_symbols"
            numbers = f"{num_heads} * ({d_base + 1} * {d_extension + 1} - 1)"
        check_count(formula, total)
        if d_sae not in (None, total):
            raise UserError(
                f"d_sae must equal {formula}; got {d_sae} with {numbers} = {total}. Leave d_sae out, or change one."
            )
        if gate not in GATES:
            raise UserError(f"gate must be one of {', '.join(GATES)}; got {gate!r}.")
        if null_symbols and gate != "mand":
            raise UserError(f"null_symbols must be used with gate 'mand'; got {gate!r}. Leave one of the two out.")
        values = {"num_heads": num_heads, "d_base": d_base, "d_extension": d_extension, "d_sae": total}
        for name, value in (values | {"gate": gate, "init_norm": init_norm, "null_symbols": null_symbols}).items():
            object.__setattr__(self, name, value)

    def build(self, d_in: int) -> KroneckerEncoder:
        """Return the encoder for inputs of width ``d_in``, not yet initialised."""
        return KroneckerEncoder(self, d_in)

    @property
    def block(self) -> int:
        """Smallest number of latents that a group boundary may not split: those of one head."""
        return self.d_sae // self.num_heads

    @property
    def latents_per_token(self) -> int:
        """Largest number of latents that one token can activate."""
        return self.d_sae

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass: ``D * H * (M + N) + F`` (paper, eq. 7)."""
        return d_in * self.num_heads * (self.d_base + self.d_extension) + self.d_sae


EncoderConfig = DenseEncoderConfig | KroneckerEncoderConfig


@runtime_checkable
class OwnEncoderConfig(Protocol):
    """Interface of the config of an encoder of your own (`kronsae.core.registration.register_encoder`)."""

    kind: ClassVar[str]
    """Name in configs and saved SAEs."""

    @property
    def d_sae(self) -> int:
        """F, latents in the dictionary."""
        ...

    @property
    def block(self) -> int:
        """Smallest number of latents that a group boundary may not split; 1 if there are no groups."""
        ...

    @property
    def latents_per_token(self) -> int:
        """Largest number of latents that one token can activate."""
        ...

    def build(self, d_in: int) -> Any:
        """Return the encoder, an ``nn.Module`` that implements `Encoder`, not yet initialised."""
        ...

    def multiply_adds(self, d_in: int) -> int:
        """Multiply-adds per token of one forward pass."""
        ...


class DenseEncoder(nn.Module):
    """``relu(W_enc x + b_enc)`` with one row of ``W_enc [d_sae, d_in]`` per latent (Gao et al. 2025)."""

    def __init__(self, config: DenseEncoderConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.weight = nn.Parameter(torch.empty(self.d_sae, d_in))
        self.bias = nn.Parameter(torch.zeros(self.d_sae))

    def forward(self, x_BD: Float[Tensor, "B D"]) -> DenseLatents:
        return DenseLatents(aligned(x_BD), self.weight, self.bias)

    @torch.no_grad()
    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights for raw x instead of ``(x - mean) / scale``, with latents scaled by ``latent_scale``."""
        self.weight.mul_(latent_scale / scale_D)
        self.bias.mul_(latent_scale).sub_(self.weight @ mean_D)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw rows from Normal(0, 1) scaled to an expected norm of `init_norm`; set the bias to 0."""
        _normal_rows(self.weight, self.config.init_norm, self.d_sae, generator)
        self.bias.zero_()

    @torch.no_grad()
    def initial_decoder_rows(self) -> Float[Tensor, "F D"]:
        """Return ``W_enc`` as rows for the decoder, which scales them to unit norm."""
        return self.weight.clone()


@dataclass(frozen=True)
class DenseLatents:
    """Latents of a `DenseEncoder`; the B x F outputs are computed in chunks of tokens and not kept."""

    x_BD: Tensor
    weight_FD: Tensor
    bias_F: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.x_BD)

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        return tuple(self._codes(*self._select(request)) for request in requests)

    def choose_ranked(self, *requests: Request) -> tuple[Ranked, ...]:
        return tuple(Ranked(codes, codes.values.detach()) for codes in self.choose(*requests))

    def materialize(self) -> Float[Tensor, "B F"]:
        return torch.addmm(self.bias_F, self.x_BD, self.weight_FD.T).relu()

    def penalty(self) -> None:
        return None

    @torch.no_grad()
    def _select(self, request: Request) -> tuple[Tensor, Tensor]:
        """Select outputs before ReLU and their latent indices; an entry that is not selected is not positive."""
        layer = self.x_BD, self.weight_FD, self.bias_F
        if isinstance(request, BatchChoice):
            return kernels.linear_batch_topk(*layer, request.total)
        if isinstance(request, Above):
            return kernels.linear_above(*layer, request.thresholds_F)
        if request.latents_C is None:
            return kernels.linear_topk(*layer, request.k)
        weight_CD, bias_C = self.weight_FD[request.latents_C], self.bias_F[request.latents_C]
        values_BK, rows_BK = kernels.linear_topk(self.x_BD, weight_CD, bias_C, request.k)
        return values_BK, request.latents_C[rows_BK]

    def _codes(self, pre_BK: Tensor, indices_BK: Tensor) -> SparseCodes:
        if torch.is_grad_enabled():
            pre_BK = kernels.linear_at(self.x_BD, self.weight_FD, self.bias_F, indices_BK, pre_BK)
        return SparseCodes(pre_BK.relu(), indices_BK, len(self.weight_FD))


class KroneckerEncoder(nn.Module):
    """H heads; head h composes its M bases and N extensions pairwise (arXiv 2505.22255).

    - pre-latents ``u = P x + b_P`` (M per head) and ``v = Q x + b_Q`` (N per head);
    - post-latents ``z[h, i, j] = gate(u[h, i], v[h, j])``;
    - latent index ``h*M*N + i*N + j``, so within a head ``vec(z) = gate(p kron q)``.

    ``weight [H, M + N, d_in]`` holds the bases and then the extensions of each head, so one product computes both.

    With *null symbols* a head has ``C = (M + 1)(N + 1) - 1`` latents, because either parent may be absent:

    - base i alone, ``z[h, i, N] = relu(u[h, i] - relu(max_j v[h, j]))``; ``z[h, M, j]`` is extension j alone, likewise;
    - latent index ``h*C + i*(N+1) + j``: a grid of M+1 bases and N+1 extensions, row-major, without its last cell.

    A parent alone must outdo all its possible partners, not only be positive. So in a head either bases or extensions
    can be active alone, not both, and the largest of its latents is ``max(sqrt(UV), |U - V|)`` with
    ``U = relu(max_i u)``, ``V = relu(max_j v)``: one of ``(i*, j*)``, ``(i*, N)`` and ``(M, j*)``. The bound by which
    heads are pruned is attained, as without null symbols, and the selection stays exact. The rival's factor is the
    constant 1: the values are on mAND's scale, and no product precedes the subtraction, so the bits do not depend on
    whether a processor fuses the two. The gradient of ``z[h, i, N] > 0`` is 1 for ``u[h, i]`` and -1 for the largest
    extension if that is positive; the first of equal ones has it.
    """

    def __init__(self, config: KroneckerEncoderConfig, d_in: int) -> None:
        super().__init__()
        self.config, self.d_in, self.d_sae = config, d_in, config.d_sae
        self.num_heads, self.d_base, self.d_extension = config.num_heads, config.d_base, config.d_extension
        self.null_symbols = config.null_symbols
        width = self.d_base + self.d_extension
        self.weight = nn.Parameter(torch.empty(self.num_heads, width, d_in))
        self.bias = nn.Parameter(torch.zeros(self.num_heads, width))
        start = self.gate.start
        self.gate_parameter = None if start is None else nn.Parameter(torch.full((1,), start))

    @property
    def gate(self) -> Gate:
        """The gate: its function and properties."""
        return GATES[self.config.gate]

    @property
    def gate_exponent(self) -> float | None:
        """Exponent p of the learned `power_mean`; None for a gate without a learned parameter."""
        return None if self.gate_parameter is None else -math.exp(float(self.gate_parameter.detach()))

    def compose(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the post-latents of two parents, elementwise."""
        return self.gate(u, v) if self.gate_parameter is None else self.gate(u, v, self.gate_parameter)

    @property
    def composition(self) -> Composition:
        """The gate as the kernels need it."""
        alone = excess if self.null_symbols else None
        return Composition(self.gate.order, self.compose, self.gate.least_product, alone)

    @property
    def W_base(self) -> Float[Tensor, "H M D"]:
        """Composition base P of each head, a view of `weight`."""
        return self.weight[:, : self.d_base]

    @property
    def W_extension(self) -> Float[Tensor, "H N D"]:
        """Composition extension Q of each head, a view of `weight`."""
        return self.weight[:, self.d_base :]

    def pre_latents(self, x_BD: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B H M"], Float[Tensor, "B H N"]]:
        """Return ``u`` and ``v`` of every head, before ReLU; differentiable."""
        pre_BP = torch.addmm(self.bias.flatten(), aligned(x_BD), self.weight.flatten(0, 1).T)
        pre_BHP = pre_BP.view(len(x_BD), *self.bias.shape)
        return pre_BHP[..., : self.d_base], pre_BHP[..., self.d_base :]

    def forward(self, x_BD: Float[Tensor, "B D"]) -> KroneckerLatents:
        return KroneckerLatents(aligned(x_BD), self)

    @torch.no_grad()
    def fold(self, mean_D: Float[Tensor, " D"], scale_D: Float[Tensor, " D"], latent_scale: Float[Tensor, ""]) -> None:
        """Rewrite weights for raw x instead of ``(x - mean) / scale``, with latents scaled by ``latent_scale``."""
        self.weight.mul_(latent_scale / scale_D)
        self.bias.mul_(latent_scale).sub_(self.weight @ mean_D)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw rows from Normal(0, 1) scaled to an expected norm of `init_norm`; set the biases to 0."""
        _normal_rows(self.weight, self.config.init_norm, self.d_sae, generator)
        self.bias.zero_()
        if self.gate_parameter is not None and self.gate.start is not None:
            self.gate_parameter.fill_(self.gate.start)

    @torch.no_grad()
    def initial_decoder_rows(self) -> Float[Tensor, "F D"]:
        """Return ``P[h, i] + Q[h, j]`` for latent (h, i, j), without an absent parent; the decoder scales the rows."""
        base_HMD, extension_HND = self.W_base, self.W_extension
        if self.null_symbols:  # an absent parent is a row of zeros
            base_HMD, extension_HND = (nn.functional.pad(rows, (0, 0, 0, 1)) for rows in (base_HMD, extension_HND))
        rows_HCD = (base_HMD.unsqueeze(2) + extension_HND.unsqueeze(1)).flatten(1, 2)
        return rows_HCD[:, : self.config.block].reshape(self.d_sae, self.d_in)


@dataclass(frozen=True)
class KroneckerLatents:
    """Latents of a `KroneckerEncoder`; even the pre-latents are computed in chunks of tokens and not kept."""

    x_BD: Tensor
    encoder: KroneckerEncoder

    @property
    def num_tokens(self) -> int:
        return len(self.x_BD)

    def choose(self, *requests: Request) -> tuple[SparseCodes, ...]:
        return tuple(self._codes(chosen) for chosen in self._select(requests))

    def choose_ranked(self, *requests: Request) -> tuple[Ranked, ...]:
        return tuple(self._ranked(chosen) for chosen in self._select(requests))

    def _select(self, requests: Sequence[Request]) -> list[kernels.PaddedPairs]:
        encoder = self.encoder
        weights = encoder.weight, encoder.bias, encoder.d_base
        return kernels.kronecker_linear_select(self.x_BD, *weights, requests, encoder.composition)

    def materialize(self) -> Float[Tensor, "B F"]:
        u_BHM, v_BHN = self.encoder.pre_latents(self.x_BD)
        shape = (*u_BHM.shape, v_BHN.shape[-1])
        z_BHMN = self.encoder.compose(u_BHM.unsqueeze(-1).expand(shape), v_BHN.unsqueeze(-2).expand(shape))
        if not self.encoder.null_symbols:
            return z_BHMN.flatten(1)
        bases_BHM1 = excess(u_BHM, v_BHN.max(-1, keepdim=True).values).unsqueeze(-1)
        extensions_BHN = excess(v_BHN, u_BHM.max(-1, keepdim=True).values)
        return torch.cat([torch.cat([z_BHMN, bases_BHM1], dim=-1).flatten(2), extensions_BHN], dim=-1).flatten(1)

    def penalty(self) -> None:
        return None

    def _codes(self, chosen: kernels.PaddedPairs) -> SparseCodes:
        encoder, indices_BK = self.encoder, chosen.selection.indices_BK
        u_BK, v_BK = chosen.pre_BR.chunk(2, dim=1)
        sizes = encoder.d_base, encoder.d_extension
        values_BK = kernels.composed(encoder.composition, u_BK, v_BK, indices_BK, *sizes)
        if chosen.chosen_BK is not None:
            values_BK = torch.where(chosen.chosen_BK, values_BK, 0.0)
        return SparseCodes(values_BK, indices_BK, encoder.d_sae)

    def _ranked(self, chosen: kernels.PaddedPairs) -> Ranked:
        codes = self._codes(chosen)
        if self.encoder.composition.order != "product":
            return Ranked(codes, codes.values.detach())
        u_BK, v_BK = chosen.pre_BR.detach().relu().chunk(2, dim=1)
        return Ranked(codes, torch.where(codes.active, u_BK * v_BK, 0.0))


def choose_ranked(latents: Latents, requests: Sequence[Request]) -> tuple[Ranked, ...]:
    """Return the codes of each request with ranks; latents that have none are ranked by value."""
    if isinstance(latents, RankedLatents):
        return latents.choose_ranked(*requests)
    return tuple(Ranked(codes, codes.values.detach()) for codes in latents.choose(*requests))


def first_by_rank(rank_BX: Float[Tensor, "B X"], indices_BX: Int[Tensor, "B X"]) -> Int[Tensor, "B X"]:
    """Return the columns of each token by falling rank; of equal ranks the smaller latent comes first."""
    by_index_BX = indices_BX.argsort(dim=1, stable=True)
    by_rank_BX = rank_BX.gather(1, by_index_BX).argsort(dim=1, stable=True, descending=True)
    return by_index_BX.gather(1, by_rank_BX)


def restricted(choice: Choice, first: int, size: int) -> Choice:
    """Return a choice for the latents ``first`` to ``first + size`` of a dictionary, counted from ``first``.

    Its k is at most the number of these latents; 0 if the choice lists none of them.
    """
    if choice.latents_C is None:
        return Choice(min(choice.k, size))
    inside_C = choice.latents_C[(choice.latents_C >= first) & (choice.latents_C < first + size)] - first
    return Choice(min(choice.k, len(inside_C)), inside_C)


def _normal_rows(weight: Tensor, norm: float | None, d_sae: int, generator: torch.Generator) -> None:
    """Fill rows with Normal(0, 1) / sqrt(2F), as in the paper, or scale them to the expected norm if one is given."""
    scale = (2 * d_sae) ** -0.5 if norm is None else norm / math.sqrt(weight.shape[-1])
    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
