"""AdamW on weight rows: takes gradients as entries and keeps decoder rows at norm 1, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kronsae.kernels.autograd import RowGradients, adamw
from kronsae.kernels.rows import AdamW
from kronsae.support.errors import UserError


class RowAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, equal up to rounding, for parameters whose gradients may be `RowGradients`.

    The state per parameter is torch's: ``step``, ``exp_avg``, ``exp_avg_sq``. A parameter group may also set:

    - ``unit_norm=True``: scale every row to norm 1 after its step (for a decoder);
    - ``only_touched=True``: do not update rows without a gradient, nor their moments. Not Adam; see `AdamW`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 3))
        >>> optimizer = RowAdamW([{"params": [weight], "unit_norm": True}], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.norm(dim=1)
        tensor([1., 1., 1., 1.], grad_fn=<LinalgVectorNormBackward0>)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"unit_norm": False, "only_touched": False})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        row_gradients: RowGradients | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        """Take one step on every parameter with a gradient in ``.grad`` or in ``row_gradients``.

        Args:
            closure: not supported.
            row_gradients: result of `collect_row_gradients`.
            grad_scale: factor on every gradient, for clipping (`clip_scale`).

        Raises:
            UserError: one parameter has a gradient in both.
        """
        if closure is not None:
            raise UserError("closure must be None; this optimiser takes one gradient per step.")
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = None if row_gradients is None else row_gradients.get(parameter)
                if gradient is not None and parameter.grad is not None:
                    raise UserError(
                        "a parameter must have its gradient in row_gradients or in .grad; got both. "
                        "Call row_gradients.materialize() to add them up."
                    )
                if gradient is None and parameter.grad is None:
                    continue
                state = self.state_of(parameter)
                state["step"] += 1
                settings = AdamW(
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(state["step"]),
                    grad_scale=grad_scale,
                    unit_norm=group["unit_norm"],
                    only_touched=group["only_touched"],
                )
                adamw(
                    parameter,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    parameter.grad if gradient is None else gradient,
                    settings,
                )

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return ``step``, ``exp_avg`` and ``exp_avg_sq`` of a parameter; zeros before its first gradient."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format, requires_grad=False)
        return state


def grad_norm(parameters: Iterable[Tensor], row_gradients: RowGradients | None = None) -> float:
    """Return ``sqrt(sum of |gradient|^2)`` over parameters, from ``.grad`` and ``row_gradients``, summed in float64."""
    total = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            total += float(parameter.grad.square().sum(dtype=torch.float64))
        if row_gradients is not None:
            total += float(row_gradients.squared_norm(parameter))
    return math.sqrt(total)


def clip_scale(norm: float, max_norm: float | None) -> float:
    """Return the factor that reduces a gradient norm to ``max_norm``, as in `torch.nn.utils.clip_grad_norm_`."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
