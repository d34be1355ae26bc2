"""Reconstruction losses of the whole dictionary, or of nested prefixes of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.core.checks import check_count
from kronsae.core.codes import SparseCodes
from kronsae.core.decoders import Decoder
from kronsae.core.shares import share_of_mean
from kronsae.support.errors import UserError


@runtime_checkable
class _EncoderShape(Protocol):
    """Attributes of an encoder config that a loss config checks."""

    @property
    def d_sae(self) -> int: ...

    @property
    def block(self) -> int: ...


def squared_error(x_BD: Float[Tensor, "B D"], x_hat_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Return ``||x - x_hat||^2``, summed over dimensions, mean over tokens; of a shared batch, the own summand."""
    return share_of_mean((x_BD - x_hat_BD).square().sum(-1))


@dataclass(frozen=True, kw_only=True)
class SquaredErrorConfig:
    """Squared error ``||x - x_hat||^2``."""

    kind: ClassVar[str] = "squared_error"

    def check(self, encoder: _EncoderShape) -> None:
        """Do nothing: this loss fits every encoder."""

    def __call__(
        self, decoder: Decoder, codes: SparseCodes, x_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B D"]]:
        """Return the loss against the target ``x``, and the reconstruction."""
        x_hat_BD = decoder(codes)
        return squared_error(x_BD, x_hat_BD), x_hat_BD


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig:
    """``sum_g ||x - (f[:m_g] W_dec[:m_g] + b_dec)||^2`` over nested prefixes m_1 < m_2 < ... = F (Bussmann 2025).

    Args:
        groups: numbers of latents that each prefix adds to the previous one. They sum to d_sae. With a Kronecker
            encoder each group ends at a head boundary. See `matryoshka_groups`.
    """

    kind: ClassVar[str] = "matryoshka"
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        for size in self.groups:
            check_count("groups", size)

    def check(self, encoder: _EncoderShape) -> None:
        """Raise if the groups do not cover the dictionary or if a boundary splits a head."""
        if sum(self.groups) != encoder.d_sae:
            raise UserError(
                f"groups must sum to d_sae; got {_format_groups(self.groups)} = {sum(self.groups)} with "
                f"d_sae={encoder.d_sae}. Change one."
            )
        for end in accumulate(self.groups):
            if end % encoder.block:
                raise UserError(
                    f"groups must end at head boundaries, multiples of d_base * d_extension = {encoder.block}; "
                    f"got {_format_groups(self.groups)}, where a group ends at {end}."
                )

    def __call__(
        self, decoder: Decoder, codes: SparseCodes, x_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B D"]]:
        """Return the loss, and the reconstruction from the whole dictionary.

        Each group is decoded once and added to the running sum, so all prefixes together read little more than K rows
        per token.
        """
        losses = []
        x_hat_BD = decoder.b_dec.expand(len(x_BD), -1)
        start = 0
        for size in self.groups:
            x_hat_BD = x_hat_BD + decoder.combine(within(codes, start, start + size))
            losses.append(squared_error(x_BD, x_hat_BD))
            start += size
        return torch.stack(losses).sum(), x_hat_BD


LossConfig = SquaredErrorConfig | MatryoshkaConfig


def within(codes: SparseCodes, start: int, end: int) -> SparseCodes:
    """Return the codes of latents ``start <= index < end``, in as few columns as possible; differentiable.

    Entries of value 0 are assigned by their index too, because JumpReLU's threshold learns from latents just below it.
    """
    return codes.only((codes.indices >= start) & (codes.indices < end), start)


def matryoshka_groups(d_sae: int, smallest: int) -> tuple[int, ...]:
    """Return ``2^k, 2^k, 2^(k+1), ...`` summing to ``d_sae`` with ``2^k = smallest``: each prefix doubles the previous.

    Example:
        >>> matryoshka_groups(4096, 512)
        (512, 512, 1024, 2048)
    """
    check_count("d_sae", d_sae)
    check_count("smallest", smallest)
    ratio = d_sae // smallest
    if d_sae % smallest or ratio & (ratio - 1):
        raise UserError(
            f"smallest must be d_sae divided by a power of 2; got smallest={smallest} with d_sae={d_sae}. "
            "Change it, or give the groups themselves."
        )
    return (smallest, *(smallest << doubling for doubling in range(ratio.bit_length() - 1)))


def _format_groups(groups: tuple[int, ...]) -> str:
    return " + ".join(map(str, groups))
