"""Selects which path runs an operation, by rule or by a forced name, and explains the selection.

The rule: `gpu` for CUDA tensors if Triton is installed, `cpu` for CPU tensors of float32 or float64 if numba is, else
`portable`. ``with kernels.use("portable"):`` or ``KRONSAE_KERNELS=portable`` forces a path. A forced path that cannot
run an operation raises an error; there is no fallback.

Heads with null symbols are selected per token by loops of their own on `cpu` and in plain PyTorch (that of `portable`)
on `gpu`; for a batch or above thresholds, in plain PyTorch on both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from kronsae.support.errors import UserError, nearest

OPERATIONS: Final = (
    "kronecker_topk",
    "kronecker_topk_among",
    "kronecker_batch_topk",
    "kronecker_linear_topk",
    "linear_topk",
    "linear_batch_topk",
    "linear_above",
    "product_chunks",
    "head_maxima",
    "kronecker_above",
    "pairs_at",
    "weighted_rows",
    "sampled_products",
    "pursue",
    "group_rows",
    "gradient_rows",
    "squared_norm",
    "adamw",
)
PATHS: Final = ("gpu", "cpu", "portable", "reference")
AUTOMATIC: Final = ("gpu", "cpu", "portable")  # in order of preference
DENSE_GRADIENTS: Final = ("portable", "reference")
"""Paths whose optimiser needs the gradient of a weight as a tensor; the others sum one row at a time."""
ENVIRONMENT: Final = "KRONSAE_KERNELS"

_override: ContextVar[str | None] = ContextVar("kronsae_kernels_path", default=None)


@contextmanager
def use(path: str) -> Iterator[None]:
    """Run every operation inside the block on one path.

    Raises:
        UserError: no path has this name.
    """
    _check_name(path, "path")
    token = _override.set(path)
    try:
        yield
    finally:
        _override.reset(token)


def forced() -> str | None:
    """Return the forced path, if any: that of the innermost `use`, else that of the environment variable."""
    named = _override.get()
    if named is None:
        named = os.environ.get(ENVIRONMENT) or None
        if named is not None:
            _check_name(named, ENVIRONMENT)
    return named


def choose(operation: str, like: Tensor) -> Callable[..., Any]:
    """Return the function that runs ``operation`` on tensors with the device and dtype of ``like``.

    Raises:
        UserError: the forced path cannot run it.
    """
    return _load_function(path_of(operation, like.device, like.dtype), operation)


def path_of(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the path that runs ``operation`` on such tensors.

    Raises:
        UserError: the forced path cannot run it.
    """
    named = forced()
    if named is not None:
        refusal = refuse(named, operation, device, dtype)
        if refusal is not None:
            raise UserError(
                f"kernels path '{named}' was forced but cannot run {operation}: {refusal}. "
                f"Remove kernels.use or {ENVIRONMENT}, or name another of {', '.join(PATHS)}."
            )
        return named
    return next(path for path in AUTOMATIC if _automatic_refusal(path, operation, device, dtype) is None)


def _automatic_refusal(path: str, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason as `refuse` does; Triton's interpreter, which is for tests, must be forced."""
    if path == "gpu" and device.type != "cuda":
        return f"tensors are on {device.type}"
    return refuse(path, operation, device, dtype)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def refuse(path: str, operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why ``path`` cannot run ``operation`` on such tensors; None if it can."""
    if path == "cpu":
        if device.type != "cpu":
            return f"tensors are on {device.type}"
        if dtype not in (torch.float32, torch.float64):
            return f"{str(dtype).removeprefix('torch.')} tensors; its loops support float32 and float64"
        return _import_refusal("cpu", "numba", "kronsae[fast]")
    if path == "gpu":
        if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
            return f"tensors are on {device.type}"
        return _import_refusal("gpu", "triton", "kronsae[gpu]")
    return None


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Return one line per operation: the path for such tensors, and why each preceding path was refused.

    Example:
        >>> from kronsae import kernels
        >>> print(kernels.explain().splitlines()[0])
        device cpu, dtype float32
    """
    device = torch.device(device)
    lines = [f"device {device}, dtype {str(dtype).removeprefix('torch.')}"]
    named = forced()
    for operation in OPERATIONS:
        considered = AUTOMATIC if named is None else (named,)
        refusing = _automatic_refusal if named is None else refuse
        refusals = {path: refusing(path, operation, device, dtype) for path in considered}
        chosen = next((path for path, refusal in refusals.items() if refusal is None), "none")
        reasons = [f"{path}: {refusal}" for path, refusal in refusals.items() if refusal is not None]
        if named is not None:
            reasons.append("forced by name")
        lines.append(f"{operation}: {chosen}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return "\n".join(lines)


@cache
def _load_module(path: str) -> ModuleType:
    return importlib.import_module(f"kronsae.kernels.{path}")


@cache
def _load_function(path: str, operation: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_load_module(path), operation)
    return function


@cache
def _import_refusal(path: str, package: str, extra: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install '{extra}')"
    try:
        _load_module(path)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return None


def _check_name(path: str, where: str) -> None:
    if path not in PATHS:
        raise UserError(f"{where} must be one of {', '.join(PATHS)}; got {path!r}.{nearest(path, PATHS)}")
