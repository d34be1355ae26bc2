"""How long PyTorch's idle threads spin before they sleep."""

from __future__ import annotations

import os
import sys

SPINS = 3000
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Let the threads of PyTorch's matrix products sleep soon after a product, by ``GOMP_SPINCOUNT``.

    By default GNU OpenMP's threads spin for milliseconds in case another product follows. The compiled kernels run
    between products, on threads of their own, and would share the cores with them (`benchmarks/spinning.py` measures
    it). The variable is read when PyTorch is loaded, so this does nothing if it already is, or if the user chose how
    threads wait. Other OpenMP libraries ignore it.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
