"""A fixture with every kernel path that can run on CPU tensors; the tests compare each with the reference.

The GPU path runs in Triton's interpreter (`make test-triton`); `kronsae bench gpu` compares it on a device.
"""

from __future__ import annotations

import pytest
import torch

from kronsae.kernels.dispatch import PATHS, refuse


def available(path: str) -> str | None:
    """Return the reason why ``path`` cannot run here, or None."""
    return refuse(path, "weighted_rows", torch.device("cpu"), torch.float32)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Return each path; skip with the dispatcher's reason if it cannot run."""
    name: str = request.param
    reason = available(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KRONSAE_KERNELS", raising=False)
