"""The threads of PyTorch's products are told to sleep soon, unless it is too late or the user chose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kronsae.support.openmp import CHOICES, SPINS

ASK = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("before", "chosen", "expected"),
    [
        ("import kronsae", {}, str(SPINS)),
        ("import torch, kronsae", {}, "None"),
        ("import kronsae", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import kronsae", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_what_is_set(before: str, chosen: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", f"{before}; {ASK}"]
    found = subprocess.run(command, env=plain | chosen, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
