"""Rows of figures, and what they say about a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Row = Mapping[str, Any]
"""Figures of one SAE with one seed, with the settings that the study varies. Keys are the columns of the CSV file."""


class Holds(StrEnum):
    """How a claim fared."""

    YES = "holds"
    PARTLY = "holds in part"
    NO = "does not hold here"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Verdict:
    """Whether the claim holds, and why, with figures: whole sentences."""

    holds: Holds
    why: str
