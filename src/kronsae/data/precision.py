"""Precisions of stored activations: float32, bfloat16, float16, and int8 with one scale per token and hook."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kronsae.support.errors import UserError, nearest

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
"""Types of the stored values, by name."""

SCALE = ":scale"
"""What follows a hook in the name of its tensor of scales; no hook ends so."""

LARGEST_INT8 = 127


def check_precision(dtype: str) -> None:
    """Raise unless activations can be stored with this precision."""
    if dtype not in PRECISIONS:
        raise UserError(f"dtype must be one of {', '.join(PRECISIONS)}; got '{dtype}'.{nearest(dtype, PRECISIONS)}")


def layout(widths: Mapping[str, int], dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape per token and type of every stored tensor, by name, for hooks of the given widths."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for hook, width in widths.items():
        found[hook] = (width,), PRECISIONS[dtype]
        if dtype == "int8":
            found[hook + SCALE] = (), torch.float32
    return found


def token_bytes(widths: Mapping[str, int], dtype: str) -> int:
    """Return the bytes of a token on disk, over all hooks."""
    return sum(kind.itemsize * (shape[0] if shape else 1) for shape, kind in layout(widths, dtype).values())


def narrow(rows_ND: Float[Tensor, "N D"], hook: str, dtype: str) -> dict[str, Tensor]:
    """Return the tensors that store the activations of a hook, by name, on the CPU.

    For int8, ``scale_N = max(|x|) / 127`` of each row, and the values are ``round(x / scale)``.

    Raises:
        UserError: a value is beyond the range of ``dtype``.
    """
    if dtype == "int8":
        rows_ND = rows_ND.float()
        scale_N = rows_ND.abs().amax(1) / LARGEST_INT8
        values_ND = (rows_ND / scale_N.where(scale_N > 0, 1)[:, None]).round().clamp(-LARGEST_INT8, LARGEST_INT8)
        stored = {hook: values_ND.to(torch.int8).cpu(), hook + SCALE: scale_N.cpu()}
        finite = bool(scale_N.isfinite().all())
    else:
        stored = {hook: rows_ND.to(PRECISIONS[dtype]).cpu()}
        finite = bool(stored[hook].isfinite().all())
    if not finite:
        raise UserError(
            f"dtype must represent every activation; got {dtype} with {rows_ND.abs().max().item():g} at hook '{hook}'. "
            "Give bfloat16 or float32, and another folder."
        )
    return stored


def widen(stored: Mapping[str, Tensor], hook: str) -> Float[Tensor, "N D"]:
    """Return the activations of a hook in float32 from the tensors that `narrow` made of them."""
    rows_ND = stored[hook].float()
    scale_N = stored.get(hook + SCALE)
    return rows_ND if scale_N is None else rows_ND.mul_(scale_N[:, None])


class LostVariance:
    """Add up what the precision costs: the share of the variance of each hook that is lost by rounding.

    ``sum((x - stored)^2) / sum((x - mean)^2)``, over all rows and columns, with the mean of these rows. 1 minus it is
    the explained variance that an SAE would have whose reconstruction were the stored activations.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._lost: dict[str, float] = {}
        self._squares: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        """Add rows of every hook, and what is stored of them."""
        for hook, rows_ND in rows.items():
            exact_ND = rows_ND.double().cpu()
            self._lost[hook] = self._lost.get(hook, 0.0) + float((exact_ND - widen(stored, hook)).square().sum())
            self._squares[hook] = self._squares.get(hook, 0.0) + float(exact_ND.square().sum())
            self._sums[hook] = self._sums.get(hook, torch.zeros(rows_ND.shape[1], dtype=torch.double)) + exact_ND.sum(0)
        self._rows += len(next(iter(rows.values())))

    def shares(self) -> dict[str, float]:
        """Return the share by hook, with 4 significant digits; 0 where nothing varies."""
        shares = {}
        for hook, lost in self._lost.items():
            varied = self._squares[hook] - float(self._sums[hook].square().sum()) / self._rows
            shares[hook] = float(f"{lost / varied:.4g}") if varied > 0 else 0.0
        return shares
