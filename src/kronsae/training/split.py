"""A dictionary whose latents several processes hold, each a part; in one process, the default, all of them."""

from __future__ import annotations

import copy
from typing import Protocol

from kronsae.core.sae import SAE, SAEConfig
from kronsae.kernels import RowGradients, grad_norm


class Split(Protocol):
    """Which latents of an SAE this process holds. All processes call every method, in the same order."""

    def build(self, shape: SAEConfig, seed: int) -> SAE:
        """Return the own part of the SAE that ``shape.build(seed)`` returns; its codes are those of the whole SAE."""
        ...

    def grad_norm(self, sae: SAE, rows: RowGradients) -> float:
        """Return the norm of the gradient of the whole SAE."""
        ...

    def whole(self, sae: SAE, shape: SAEConfig) -> SAE:
        """Return a copy of the whole SAE of which ``sae`` is the own part."""
        ...


class Undivided:
    """The `Split` of a process that holds the whole SAE."""

    def build(self, shape: SAEConfig, seed: int) -> SAE:
        return shape.build(seed)

    def grad_norm(self, sae: SAE, rows: RowGradients) -> float:
        return grad_norm(sae.parameters(), rows)

    def whole(self, sae: SAE, shape: SAEConfig) -> SAE:
        return copy.deepcopy(sae)
