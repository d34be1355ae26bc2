"""Gates compose a base's pre-latent u and an extension's v into one post-latent.

Each is elementwise and differentiable. Its `Order` says how its values are ranked, and so which selection is exact
for it: by the product of the parents, by the parents (both prune whole heads), or only with all latents computed.
Method: section 3 of arXiv 2505.22255.

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

MAX_SLOPE = 1e4  # bound on mAND's partial derivatives; reached only where one parent is 4e8 times the other
PAPER_EPSILON = 1e-5

GateName = Literal["mand", "mand_eps", "relu_product", "raw_product", "minimum", "and_ail", "power_mean"]


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


def relu_product(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``relu(u) * relu(v)``: an AND whose scale is the square of its parents' (paper, table 1)."""
    return u.relu() * v.relu()


def raw_product(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``u * v``: no AND, since two negative parents switch it on (paper, table 1)."""
    return u * v


def minimum(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``min(relu(u), relu(v))``: the fuzzy AND of Zadeh (1965); the larger parent gets no gradient."""
    return torch.minimum(u, v).relu()


def and_ail(u: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """AND of two logits, approximately (Lowe et al. 2021): ``u + v`` if both are negative, else ``min(u, v)``.

    A latent is kept only where it is positive, and there this is `minimum`: the two differ in what lies below 0.
    """
    return torch.where((u < 0) & (v < 0), u + v, torch.minimum(u, v))


def power_mean(
    u: Float[Tensor, "..."], v: Float[Tensor, "..."], log_exponent: Float[Tensor, " 1"]
) -> Float[Tensor, "..."]:
    """``((u^p + v^p) / 2)^(1/p)`` if ``u > 0 and v > 0``, else 0, with ``p = -exp(log_exponent)``.

    p towards 0 is `mand`, -1 the harmonic mean, towards minus infinity the minimum. p stays below 0 because only
    there the mean vanishes as either parent does: the AND is continuous. Computed as
    ``a * (2 / (1 + (b/a)^p))^(1/|p|)`` with a the smaller and b the larger parent, which cannot overflow.
    """
    on = (u > 0) & (v > 0)
    u, v = torch.where(on, u, 1.0), torch.where(on, v, 1.0)
    smallest = torch.finfo(u.dtype).tiny  # of a subnormal, the logarithm's slope 1 / u would overflow
    ratio = (u.clamp_min(smallest).log() - v.clamp_min(smallest).log()).abs()
    strength = log_exponent.exp()
    factor = (math.log(2) - (-strength * ratio).exp().log1p()) / strength
    return torch.where(on, torch.minimum(u, v) * factor.exp(), 0.0)


@dataclass(frozen=True)
class Gate:
    """A gate's function and what the encoder has to know of it.

    Args:
        function: ``(u, v)``, or ``(u, v, parameter)`` for a learned gate.
        order: by what its values are ranked.
        signed: it can be negative; the latent is then its positive part.
        homogeneous: ``gate(s u, s v) = s gate(u, v)`` for ``s > 0``.
        start: initial value of its one learned parameter; None: nothing is learned.
        least_product: of a gate of order ``product``, the inverse ``theta -> u v``, less what rounding may add to it.
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


_LESS = 1 - 1e-4  # a thousand times what float32 rounds

GATES: dict[str, Gate] = {
    "mand": Gate(mand, "product", homogeneous=True, least_product=lambda theta: _LESS * theta.square()),
    "mand_eps": Gate(mand_eps, "product", least_product=lambda theta: _LESS * theta.square() - PAPER_EPSILON),
    "relu_product": Gate(relu_product, "product", least_product=lambda theta: _LESS * theta),
    "raw_product": Gate(raw_product, "none", signed=True),
    "minimum": Gate(minimum, "parents", homogeneous=True),
    "and_ail": Gate(and_ail, "parents", signed=True, homogeneous=True),
    # p starts between mand (0) and the harmonic mean (-1)
    "power_mean": Gate(power_mean, "parents", homogeneous=True, start=math.log(0.5)),
}
