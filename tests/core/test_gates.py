from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsae.core.gates import (
    GATES,
    MAX_SLOPE,
    PAPER_EPSILON,
    and_ail,
    mand,
    mand_eps,
    minimum,
    power_mean,
    raw_product,
    relu_product,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def extremes(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, the smallest subnormal, the smallest normal, the largest, and ordinary numbers, of both signs."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    positive = torch.tensor([0.0, smallest, 3 * smallest, info.smallest_normal, 1e-8, 1.0, 7.0, info.max], dtype=dtype)
    assert (positive[1:] > 0).all()
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mand_is_on_exactly_where_both_parents_are(dtype: torch.dtype) -> None:
    values = extremes(dtype)
    # repeated, so that vectorised code, whole vectors and their tails, meets them too
    u, v = (part.flatten().repeat(9) for part in torch.meshgrid(values, values, indexing="ij"))
    z = mand(u, v)
    assert z.dtype == dtype
    assert torch.equal(z > 0, (u > 0) & (v > 0))
    assert (z[(u <= 0) | (v <= 0)] == 0).all()
    assert z.isfinite().all()
    assert torch.equal(z, mand(v, u))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_mand_is_finite_everywhere_and_zero_off_the_support(dtype: torch.dtype) -> None:
    values = extremes(dtype)
    u, v = (part.flatten().clone().requires_grad_() for part in torch.meshgrid(values, values, indexing="ij"))
    mand(u, v).sum().backward()
    on = (u > 0) & (v > 0)
    for parent in (u, v):
        assert parent.grad is not None
        assert parent.grad.isfinite().all()
        assert (parent.grad[~on] == 0).all()
        assert (parent.grad >= 0).all()
        assert parent.grad.max() <= torch.tensor(MAX_SLOPE, dtype=dtype)


def test_slope_is_bounded_only_beyond_the_stated_ratio() -> None:
    u = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    mand(u, torch.tensor([3.9e8, 4.1e8], dtype=torch.float64)).sum().backward()
    assert u.grad is not None
    assert u.grad[0].item() == pytest.approx(0.5 * math.sqrt(3.9e8), rel=1e-12)
    assert u.grad[1].item() == MAX_SLOPE


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_mand_is_the_geometric_mean_and_its_gradient_the_analytic_one(a: float, b: float) -> None:
    u, v = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (a, b))
    z = mand(u, v)
    z.sum().backward()
    assert u.grad is not None
    assert v.grad is not None
    assert z.item() == pytest.approx(math.sqrt(a * b), rel=1e-14)
    assert u.grad.item() == pytest.approx(0.5 * math.sqrt(b / a), rel=1e-14)
    assert v.grad.item() == pytest.approx(0.5 * math.sqrt(a / b), rel=1e-14)


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    # finite differences must not step over a kink: 0, and equal parents for a minimum
    away = (u.abs() > 0.05) & (v.abs() > 0.05) & ((u - v).abs() > 0.05)
    inputs = (u[away].requires_grad_(), v[away].requires_grad_(), *learned(gate))
    assert torch.autograd.gradcheck(GATES[gate], inputs)


def test_second_derivative_is_refused_and_not_wrong() -> None:
    u, v = torch.ones(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(mand(u, v).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_paper_epsilon_is_the_listing() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    listing = torch.sqrt(torch.relu(u) * torch.relu(v) + 1e-5)
    assert torch.equal(mand_eps(u, v), listing)
    off = (u <= 0) | (v <= 0)
    assert off.any()
    assert mand_eps(u, v)[off].min().item() == pytest.approx(0.00316, abs=1e-5)
    assert (mand(u, v)[off] == 0).all()
    assert PAPER_EPSILON == 1e-5


@pytest.mark.parametrize("gate", [name for name, gate in GATES.items() if gate.order == "product"])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_gates_of_order_product_rise_with_the_product(gate: str, seed: int) -> None:
    """Test the property that makes TopK by product exact."""
    u, v = torch.randn(2, 200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = (u.relu() * v.relu()).argsort()
    z = GATES[gate](u, v)[order]
    assert (z.diff() >= -1e-15).all()


def rises_with_the_parents(gate: str) -> bool:
    """On a grid, the gate is nondecreasing in each parent, and 0 unless both are positive."""
    grid = torch.linspace(-2, 2, 41, dtype=torch.float64)
    z_UV = GATES[gate](grid.unsqueeze(1), grid.unsqueeze(0), *learned(gate))
    off = (grid.unsqueeze(1) <= 0) | (grid.unsqueeze(0) <= 0)
    rises = all(bool((z_UV.diff(dim=dim) >= -1e-15).all()) for dim in (0, 1))
    return rises and bool((z_UV[off] == 0).all())


@pytest.mark.parametrize("gate", GATES)
def test_pruning_by_head_is_claimed_for_the_gates_that_rise_with_their_parents(gate: str) -> None:
    if gate == "mand_eps":
        return  # rises, but is not 0 off the support; it is selected by product
    assert rises_with_the_parents(gate) == (GATES[gate].order != "none")


def learned(gate: str) -> list[torch.Tensor]:
    """Return the gate's parameter, if it has one, at a value other than its initial one."""
    return [] if GATES[gate].start is None else [torch.tensor([0.3], dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("exponent", [-1e-3, -1.0, -60.0])
def test_power_mean_runs_from_mand_to_the_minimum(exponent: float) -> None:
    u, v = torch.rand(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    z = power_mean(u, v, torch.tensor([math.log(-exponent)], dtype=torch.float64))
    expected = ((u**exponent + v**exponent) / 2) ** (1 / exponent)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=0)
    if exponent == -1.0:
        torch.testing.assert_close(z, 2 * u * v / (u + v))
    limit = mand(u, v) if exponent > -1 else torch.minimum(u, v)
    if exponent != -1.0:
        torch.testing.assert_close(z, limit, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_mean_and_its_gradients_are_finite_everywhere(dtype: torch.dtype) -> None:
    values = extremes(dtype)
    u, v = (part.flatten().clone().requires_grad_() for part in torch.meshgrid(values, values, indexing="ij"))
    log_exponent = torch.zeros(1, dtype=dtype, requires_grad=True)
    z = power_mean(u, v, log_exponent)
    (z / torch.finfo(dtype).max).sum().backward()
    assert (z[(u <= 0) | (v <= 0)] == 0).all()
    for tensor in (u, v, log_exponent):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_and_ail_is_lowe_s_formula_and_keeps_what_the_minimum_keeps() -> None:
    u, v = torch.tensor([2.0, 2.0, -1.0, -1.0]), torch.tensor([3.0, -3.0, 4.0, -5.0])
    assert and_ail(u, v).tolist() == [2.0, -3.0, -1.0, -6.0]
    assert torch.equal(GATES["and_ail"](u, v), minimum(u, v))


def test_products() -> None:
    u, v = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([3.0, -3.0, -4.0])
    assert relu_product(u, v).tolist() == [6.0, 0.0, 0.0]
    assert raw_product(u, v).tolist() == [6.0, -6.0, 4.0]
    assert GATES["raw_product"](u, v).tolist() == [6.0, 0.0, 4.0]
