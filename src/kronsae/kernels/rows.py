"""Data types for weight gradients stored sparsely: for each weight row, a short list of (token, weight) entries.

``G[p] = sum of w * x[t]`` over the entries (t, w) of row p. The tensor G (F x D for a decoder) is never needed as a
whole: an optimiser sums one row at a time. The loops over these types belong to the paths.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Weight gradient of one backward pass: ``G[rows[b, r]] += weights[b, r] * x[b]``."""

    weights_BR: Float[Tensor, "B R"]
    rows_BR: Int[Tensor, "B R"]
    x_BD: Float[Tensor, "B D"]


@dataclass(frozen=True)
class RowGradient:
    """Entries grouped by weight row: row p has entries ``offsets[p]`` to ``offsets[p + 1]``, in order of token.

    Entries of weight 0 are left out, so a row with ``offsets[p] == offsets[p + 1]`` has no gradient.
    """

    offsets: Int[Tensor, " P1"]
    tokens_N: Int[Tensor, " N"]
    weights_N: Float[Tensor, " N"]
    x_BD: Float[Tensor, "B D"]

    @property
    def height(self) -> int:
        """P, number of rows of the weight."""
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Settings of one step of Adam with decoupled weight decay (Loshchilov & Hutter 2019), ordered as in torch.

    For each row, with gradient g already multiplied by ``grad_scale`` and t = ``step`` counted from 1:

    - ``m = beta1 m + (1 - beta1) g``; ``v = beta2 v + (1 - beta2) g^2``;
    - ``w = w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``;
    - with ``unit_norm``, ``w = w / |w|``.

    Args:
        only_touched: do not update rows without a gradient (weight and both moments). This is not Adam, but the work
            is proportional to the rows with a gradient. Off by default.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0
    unit_norm: bool = False
    only_touched: bool = False

    @property
    def decay(self) -> float:
        """Factor on the weight before the step: ``1 - lr weight_decay``."""
        return 1 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """``lr / (1 - beta1^t)``."""
        return float(self.lr / (1 - self.beta1**self.step))

    @property
    def root_scale(self) -> float:
        """``1 / sqrt(1 - beta2^t)``."""
        return float((1 - self.beta2**self.step) ** -0.5)
