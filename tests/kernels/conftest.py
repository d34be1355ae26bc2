"""A fixture with every kernel path that can run here; the tests compare each with the reference."""

from __future__ import annotations

import pytest
import torch

from kronsae.kernels.dispatch import PATHS, refuse


def available(path: str) -> str | None:
    """Return the reason why ``path`` cannot run here, or None."""
    device = torch.device("cuda" if torch.cuda.is_available() and path == "gpu" else "cpu")
    return refuse(path, "weighted_rows", device, torch.float32)


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
