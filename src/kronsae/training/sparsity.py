"""How strongly JumpReLU's l0 is penalised: a fixed coefficient with a warm-up, or one steered towards a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronsae.support.errors import UserError

THRESHOLD_LR_FLOOR = 0.1  # of the peak rate: thresholds that stop with the weights cannot bring l0 to its target


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """The weight of l0 in the loss. Means something for JumpReLU only, whose thresholds learn from it.

    Args:
        coefficient: of l0 in the loss (Rajamanoharan et al. 2024b); None: steered so that l0 comes to the
            sparsifier's k.
        warmup_share: share of all steps over which a fixed coefficient rises linearly from 0.
        threshold_lr_scale: learning rate of the thresholds' logarithms, as a multiple of the other weights'; it
            falls to a tenth of its peak and no further.
    """

    coefficient: float | None = None
    warmup_share: float = 0.1
    threshold_lr_scale: float = 10.0

    def __post_init__(self) -> None:
        if self.coefficient is not None and not 0 <= self.coefficient < math.inf:
            raise UserError(f"sparsity.coefficient must be finite and at least 0; got {self.coefficient!r}.")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"sparsity.warmup_share must be in [0, 1]; got {self.warmup_share!r}.")
        if not 0 < self.threshold_lr_scale < math.inf:
            raise UserError(f"sparsity.threshold_lr_scale must be finite and above 0; got {self.threshold_lr_scale!r}.")


class SparsityController:
    """Gives each step its l0 coefficient; state of training, saved with it.

    With a target: ``coefficient = loss / target * (strength + GAIN * (e - 1))`` where e is l0 over the target and
    ``loss`` the reconstruction loss of the step before, which makes the rule independent of the activations' scale.
    ``strength`` integrates: ``strength += RATE * (e - 1)``. The proportional part is the gradient of a quadratic
    penalty ``(l0 / target - 1)^2``, the integral part removes its lag. Over the last `SETTLING` of the steps, where the
    weights hardly move any more, all thresholds are moved together besides, by a factor ``(l0 / target)^SETTLING_GAIN``
    a step: what is left of the error after a short training is gone by its end.
    """

    GAIN, RATE = 5.0, 0.25
    LIMIT = 1.0  # errors beyond twice the target push no harder: the first steps must not wind the integral up

    SETTLING, SETTLING_GAIN = 0.15, 0.1  # so small a gain that the noise of single batches averages out

    def __init__(self, config: SparsityConfig, target: int) -> None:
        self.config, self.target = config, target
        self.state = torch.tensor([0.0, 0.0], dtype=torch.float64)  # strength, coefficient of the next step

    def coefficient(self, step: int, steps: int) -> float:
        """The coefficient of step number ``step`` (from 0) of ``steps``."""
        if self.config.coefficient is None:
            return float(self.state[1])
        warmup = round(self.config.warmup_share * steps)
        return self.config.coefficient * min(1.0, (step + 1) / max(1, warmup))

    def update(self, l0: Tensor, reconstruction_loss: Tensor) -> None:
        """Take in what the step came to."""
        if self.config.coefficient is None:
            error = min(self.LIMIT, float(l0) / self.target - 1)
            strength = float(self.state[0]) + self.RATE * error
            coefficient = float(reconstruction_loss) / self.target * (strength + self.GAIN * error)
            self.state.copy_(torch.tensor([strength, coefficient]))

    def threshold_factor(self, l0: Tensor, step: int, steps: int) -> float:
        """What to multiply all thresholds with after step number ``step`` (from 0) of ``steps``, given its l0."""
        if self.config.coefficient is not None or step < (1 - self.SETTLING) * steps or float(l0) <= 0:
            return 1.0
        return math.pow(float(l0) / self.target, self.SETTLING_GAIN)
