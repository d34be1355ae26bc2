"""Helpers for tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

KRON = "kron num_heads=8 d_base=2 d_extension=2 k=4"


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return stdout parsed as JSON, which must not contain NaN or infinity."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    @property
    def sentence(self) -> str:
        """Return the error line; there must be no traceback and nothing on stdout."""
        assert "Traceback" not in self.err
        assert self.out == ""
        errors = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert self.err.splitlines()[-1:] == errors, self.err
        return errors[0].removeprefix("Error: ")


Kronsae = Callable[..., Outcome]


def without(words: list[str], option: str) -> list[str]:
    """Return the words without an option and its value."""
    at = words.index(option)
    return words[:at] + words[at + 2 :]
