"""Weight of l0 in JumpReLU's loss: a fixed coefficient with warm-up, or one controlled to reach a target l0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kronsae.support.errors import UserError

THRESHOLD_LR_FLOOR = 0.1  # share of the peak rate: thresholds that stop with the weights could not reach the target l0


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Config of the weight of l0 in the loss, used only by JumpReLU, whose thresholds learn from it.

    Args:
        coefficient: of l0 in the loss (Rajamanoharan et al. 2024b); None: controlled so that l0 approaches the
            sparsifier's k.
        warmup_share: share of all steps over which a fixed coefficient increases linearly from 0.
        threshold_lr_scale: learning rate of the logarithms of the thresholds, as a multiple of that of other weights;
            it decays to a tenth of its peak and not below.
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
    """Computes the l0 coefficient of each step; part of the training state and saved with it.

    With a target: ``coefficient = loss / target * (strength + GAIN * (e - 1))``, where e is l0 / target and ``loss``
    the reconstruction loss of the previous step, which makes the rule independent of the scale of activations.
    ``strength`` is an integral: ``strength += RATE * (e - 1)``. The proportional part is the gradient of a quadratic
    penalty ``(l0 / target - 1)^2``; the integral part removes its lag. Over the last `SETTLING` share of the steps,
    when the weights hardly change any more, every step also multiplies all thresholds by
    ``(l0 / target)^SETTLING_GAIN``. This removes the error that remains after a short training.
    """

    GAIN, RATE = 5.0, 0.25
    LIMIT = 1.0  # the error is capped at twice the target, so that the first steps do not wind up the integral

    SETTLING, SETTLING_GAIN = 0.15, 0.1  # the gain is small enough to average out the noise of single batches

    def __init__(self, config: SparsityConfig, target: int) -> None:
        self.config, self.target = config, target
        self.state = torch.tensor([0.0, 0.0], dtype=torch.float64)  # strength, coefficient of the next step

    def coefficient(self, step: int, steps: int) -> float:
        """Return the coefficient of step ``step`` (from 0) of ``steps``."""
        if self.config.coefficient is None:
            return float(self.state[1])
        warmup = round(self.config.warmup_share * steps)
        return self.config.coefficient * min(1.0, (step + 1) / max(1, warmup))

    def update(self, l0: Tensor, reconstruction_loss: Tensor) -> None:
        """Update the controller with the results of a step."""
        if self.config.coefficient is None:
            error = min(self.LIMIT, float(l0) / self.target - 1)
            strength = float(self.state[0]) + self.RATE * error
            coefficient = float(reconstruction_loss) / self.target * (strength + self.GAIN * error)
            self.state.copy_(torch.tensor([strength, coefficient]))

    def threshold_factor(self, l0: Tensor, step: int, steps: int) -> float:
        """Return the factor for all thresholds after step ``step`` (from 0) of ``steps``, given its l0."""
        if self.config.coefficient is not None or step < (1 - self.SETTLING) * steps or float(l0) <= 0:
            return 1.0
        return math.pow(float(l0) / self.target, self.SETTLING_GAIN)
