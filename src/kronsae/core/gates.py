"""Gates compose a base's pre-latent u and an extension's v into one post-latent.

Each is elementwise, differentiable, and monotone in ``relu(u) * relu(v)``, which is what makes the head-pruned
TopK exact for it. Method: section 3 of arXiv 2505.22255.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_SLOPE = 1e4  # bound on mAND's partial derivatives; reached only where one parent is 4e8 times the other
PAPER_EPSILON = 1e-5

GateName = Literal["mand", "mand_eps"]


class _MAND(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        # two roots, not the root of a product: u * v underflows to 0 where both are positive
        root_u, root_v = u.relu().sqrt(), v.relu().sqrt()
        ctx.save_for_backward(root_u, root_v)
        return root_u * root_v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        root_u, root_v = ctx.saved_tensors
        on = (root_u > 0) & (root_v > 0)
        slope_u = torch.where(on, 0.5 * root_v / root_u, 0.0).clamp(max=MAX_SLOPE)
        slope_v = torch.where(on, 0.5 * root_u / root_v, 0.0).clamp(max=MAX_SLOPE)
        return grad * slope_u, grad * slope_v


def mand(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The differentiable AND: ``sqrt(u * v)`` if ``u > 0 and v > 0``, else exactly 0.

    The root (a geometric mean) keeps the activation on the scale of its parents. The partial derivatives
    ``0.5 * sqrt(v / u)`` and ``0.5 * sqrt(u / v)`` are 0 off the support and bounded by `MAX_SLOPE` on it.

    Example:
        >>> mand(torch.tensor([4.0, 4.0, -1.0]), torch.tensor([9.0, 0.0, -1.0]))
        tensor([6., 0., 0.])
    """
    return cast(Tensor, _MAND.apply(u, v))


def mand_eps(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The paper's listing: ``sqrt(relu(u) * relu(v) + 1e-5)``, so an inactive pair is 0.00316 and not 0.

    It breaks the AND; it is here so that results can be compared with the authors' code.
    """
    return (u.relu() * v.relu() + PAPER_EPSILON).sqrt()


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mand": mand, "mand_eps": mand_eps}
HOMOGENEOUS = {"mand"}
"""Gates with ``gate(s u, s v) = s gate(u, v)`` for ``s > 0``."""
