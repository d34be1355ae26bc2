"""Helpers for kernel tests: the operations of a path on its device, and the tolerances."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Sums of at most a few thousand products in another order: relative to the largest value of the result.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 1.6e-2}


def operation(path: str, name: str) -> Callable[..., Any]:
    """Return the function ``name`` of ``path``."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"kronsae.kernels.{path}"), name)
    return function


def same_values(got: Tensor, want: Tensor, factor: float = 1.0) -> None:
    """Assert equal shape and dtype, no NaN, and differences within the dtype's tolerance of the largest value."""
    assert got.shape == want.shape
    assert not got.isnan().any()
    if want.numel():
        tolerance = factor * TOLERANCE[got.dtype] * max(1e-30, float(want.detach().abs().max()))
        torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=tolerance)
