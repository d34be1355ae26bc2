"""Every path that can run here, as a fixture: the suite holds each of them to the reference."""

from __future__ import annotations

import pytest
import torch

from kronsae.kernels.dispatch import PATHS, refuse


def available(path: str) -> str | None:
    """Why ``path`` cannot run its best-known operation here, or None."""
    device = torch.device("cuda" if torch.cuda.is_available() and path == "gpu" else "cpu")
    return refuse(path, "weighted_rows", device, torch.float32)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    """Each path in turn; skipped with the reason of the dispatch where it cannot run."""
    name: str = request.param
    reason = available(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KRONSAE_KERNELS", raising=False)
