"""PyTorch is loaded with threads that sleep soon, unless it is too late or the user chose; nothing is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from kronsae.support.openmp import CHOICES, NAME, SPINS


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
@pytest.mark.parametrize(
    ("imports", "chosen", "expected"),
    [
        ("kronsae", {}, str(SPINS)),
        ("torch, kronsae", {}, "default"),
        ("kronsae", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("kronsae", {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_what_openmp_read(imports: str, chosen: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", f"import {imports}, os; print(os.environ.get('{NAME}'))"]

    def run(environment: dict[str, str]) -> tuple[str, str]:
        """What PyTorch's OpenMP read, the last one loaded, and what is left in the environment."""
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[-1], done.stdout.strip()

    read, left = run(plain | chosen | {"OMP_DISPLAY_ENV": "verbose"})
    if expected == "default":
        assert read != str(SPINS)
    else:
        assert read == expected
    assert left == chosen.get(NAME, "None")
