"""Argument checks shared by several configs."""

from __future__ import annotations

import math

from kronsae.support.errors import UserError, shown

LARGEST_COUNT = 10**12
"""Upper limit for every count of latents, tokens or steps; far above it tensor shapes overflow."""


def check_positive(name: str, value: float | None) -> None:
    """Raise unless the number is finite and above 0. None means "not given" and passes."""
    if value is not None and not value > 0:
        raise UserError(f"{name} must be above 0; got {shown(value)}.")
    if value == math.inf:
        raise UserError(f"{name} must be finite; got {shown(value)}.")


def check_seed(value: int) -> None:
    """Raise unless the seed is an integer that both torch's and NumPy's generators accept."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise UserError(f"seed must be from 0 to 2**63 - 1; got {shown(value)}.")


def check_count(name: str, value: object) -> None:
    """Raise unless the value is a whole number from 1 to `LARGEST_COUNT`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number above 0; got {shown(value)}.")
    if value > LARGEST_COUNT:
        raise UserError(f"{name} must be at most {LARGEST_COUNT:,}; got {shown(value)}. Ask for less.")
