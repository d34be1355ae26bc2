"""How long PyTorch's idle threads spin before they sleep."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

NAME, SPINS = "GOMP_SPINCOUNT", 3000
CHOICES = (NAME, "OMP_WAIT_POLICY")


@contextmanager
def brief_spinning() -> Iterator[None]:
    """Load PyTorch with threads that sleep soon after a product, by ``GOMP_SPINCOUNT``.

    By default GNU OpenMP's threads spin for milliseconds in case another product follows. The compiled kernels run
    between products, on threads of their own, and would share the cores with them (`benchmarks/spinning.py` measures
    it). The variable is read when PyTorch is loaded, and removed again at the end: processes that are started later
    do not see it. Nothing is set if PyTorch is loaded already, if numba is missing, so that there are no compiled
    kernels, or if the user chose how threads wait. Other OpenMP libraries ignore the variable.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES) or find_spec("numba") is None:
        yield
        return
    os.environ[NAME] = str(SPINS)
    try:
        yield
    finally:
        del os.environ[NAME]
