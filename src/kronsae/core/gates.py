"""Gates that compose a base's pre-latent u and an extension's pre-latent v into one post-latent.

Every gate is elementwise and differentiable. Its `Order` says what ranks its values, and so which selection is exact
for it: ranking by the product of the parents or by the parents (both allow pruning whole heads), or no pruning, which
computes all latents. Method: section 3 of arXiv 2505.22255.

============  ===========================================  ========  =================================================
name          z for u > 0 and v > 0                        order     otherwise
============  ===========================================  ========  =================================================
mand          ``sqrt(u v)``                                product   0
mand_eps      ``sqrt(u v + 1e-5)``                         product   0.00316
relu_product  ``u v``                                      product   0
raw_product   ``u v``                                      none      ``u v``; kept where positive: both parents negative
minimum       ``min(u, v)``                                parents   0
and_ail       ``min(u, v)``                                parents   below 0, never kept
power_mean    ``((u^p + v^p) / 2)^(1/p)``, p < 0 learned   parents   0
============  ===========================================  ========  =================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kronsae.kernels import Order

MAX_SLOPE = 1e4  # bound on mAND's partial derivatives; reached only if one parent is 4e8 times the other
PAPER_EPSILON = 1e-5

GateName = Literal["mand", "mand_eps", "relu_product", "raw_product", "minimum", "and_ail", "power_mean"]


class _MAND(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        # product of two roots: u * v can underflow to 0 although both are positive
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
    """mAND, the differentiable AND: ``sqrt(u * v)`` if ``u > 0 and v > 0``, else exactly 0.

    The square root (a geometric mean) keeps the activation on the scale of its parents. The partial derivatives are
    ``0.5 * sqrt(v / u)`` and ``0.5 * sqrt(u / v)``: 0 outside the support, and bounded by `MAX_SLOPE` inside it.

    Example:
        >>> mand(torch.tensor([4.0, 4.0, -1.0]), torch.tensor([9.0, 0.0, -1.0]))
        tensor([6., 0., 0.])
    """
    return cast(Tensor, _MAND.apply(u, v))


def mand_eps(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """mAND as in the paper's listing: ``sqrt(relu(u) * relu(v) + 1e-5)``; an inactive pair gives 0.00316, not 0.

    This is not an AND. It exists so that results can be compared with the authors' code.
    """
    return (u.relu() * v.relu() + PAPER_EPSILON).sqrt()


def relu_product(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``relu(u) * relu(v)``: an AND on the squared scale of its parents (paper, table 1)."""
    return u.relu() * v.relu()


def raw_product(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``u * v``: not an AND, because two negative parents give a positive value (paper, table 1)."""
    return u * v


def minimum(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``min(relu(u), relu(v))``: the fuzzy AND of Zadeh (1965). The larger parent gets no gradient."""
    return torch.minimum(u, v).relu()


def and_ail(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Approximate AND of two logits (Lowe et al. 2021): ``u + v`` if both are negative, else ``min(u, v)``.

    Only positive latents are kept, and for those it equals `minimum`. The two gates differ only below 0.
    """
    return torch.where((u < 0) & (v < 0), u + v, torch.minimum(u, v))


def excess(w: Float[Tensor, "..."], rival: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``relu(w - relu(rival))``: a parent alone (null symbols), with ``rival`` the largest that could be its partner.

    The partial derivatives are 1 for w and, if ``rival > 0``, -1 for the rival where the value is positive, else 0. On
    the scale of `mand`: beside its partner of the largest pre-latent v, a base u alone is larger than their pair,
    ``u - v > sqrt(u v)``, if ``u / v > (3 + sqrt(5)) / 2 = 2.618``.

    Example:
        >>> excess(torch.tensor([4.0, 4.0, 4.0, -1.0]), torch.tensor([1.0, -9.0, 5.0, -9.0]))
        tensor([3., 4., 0., 0.])
    """
    return (w - rival.relu()).relu()


def power_mean(
    u: Float[Tensor, "..."], v: Float[Tensor, "..."], log_exponent: Float[Tensor, " 1"]
) -> Float[Tensor, "..."]:
    """``((u^p + v^p) / 2)^(1/p)`` if ``u > 0 and v > 0``, else 0, with ``p = -exp(log_exponent)``.

    p -> 0 gives `mand`, p = -1 the harmonic mean, p -> -infinity the minimum. p must be below 0: only then is the mean
    0 as soon as one parent is 0, so that the AND is continuous. It is computed as
    ``a * (2 / (1 + (b/a)^p))^(1/|p|)``, with a the smaller and b the larger parent; this form cannot overflow.
    """
    on = (u > 0) & (v > 0)
    u, v = torch.where(on, u, 1.0), torch.where(on, v, 1.0)
    smallest = torch.finfo(u.dtype).tiny  # 1 / u, the slope of the logarithm, overflows for subnormal u
    ratio = (u.clamp_min(smallest).log() - v.clamp_min(smallest).log()).abs()
    strength = log_exponent.exp()
    factor = (math.log(2) - (-strength * ratio).exp().log1p()) / strength
    return torch.where(on, torch.minimum(u, v) * factor.exp(), 0.0)


@dataclass(frozen=True)
class Gate:
    """A gate function and its properties that the encoder needs.

    Args:
        function: ``(u, v)``, or ``(u, v, parameter)`` for a learned gate.
        order: what ranks its values.
        signed: whether it can be negative; the latent is then its positive part.
        homogeneous: whether ``gate(s u, s v) = s gate(u, v)`` for ``s > 0``.
        start: initial value of the gate's single learned parameter; None: nothing is learned.
        least_product: for order ``product``: the inverse ``theta -> u v``, lowered by a margin for rounding errors.
    """

    function: Callable[..., Tensor]
    order: Order
    signed: bool = False
    homogeneous: bool = False
    start: float | None = None
    least_product: Callable[[Tensor], Tensor] | None = None

    def __call__(self, u: Tensor, v: Tensor, *parameter: Tensor) -> Tensor:
        z = self.function(u, v, *parameter)
        return z.relu() if self.signed else z


_ROUNDING_MARGIN = 1 - 1e-4  # margin of a thousand times the rounding error of float32

GATES: dict[str, Gate] = {
    "mand": Gate(mand, "product", homogeneous=True, least_product=lambda theta: _ROUNDING_MARGIN * theta.square()),
    "mand_eps": Gate(
        mand_eps, "product", least_product=lambda theta: _ROUNDING_MARGIN * theta.square() - PAPER_EPSILON
    ),
    "relu_product": Gate(relu_product, "product", least_product=lambda theta: _ROUNDING_MARGIN * theta),
    "raw_product": Gate(raw_product, "none", signed=True),
    "minimum": Gate(minimum, "parents", homogeneous=True),
    "and_ail": Gate(and_ail, "parents", signed=True, homogeneous=True),
    # p starts between mand (0) and the harmonic mean (-1)
    "power_mean": Gate(power_mean, "parents", homogeneous=True, start=math.log(0.5)),
}
