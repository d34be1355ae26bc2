"""Differentiable operations: values and every gradient, by name, against autograd through the definition."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from tests.kernels.helpers import same_values
from torch import Tensor

from kronsae import kernels
from kronsae.kernels import Choice, autograd, dispatch, reference

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1, 1, 1), (5, 3, 7, 13), (33, 9, 50, 17), (64, 32, 300, 96)]  # B, K, F, D


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of a fixed random projection of it, by input name."""
    output = function(**inputs)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(3))
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    found = torch.autograd.grad((output * direction).sum(), list(wanted.values()))
    return output, dict(zip(wanted, found, strict=True))


def compare(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    same_values(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        try:
            same_values(got[1][name], gradient)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(path: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, k, height, width = size
    inputs = {
        "values_BK": leaf(tokens, k, dtype=dtype),
        "indices_BK": torch.randint(height, (tokens, k)),  # latents that occur twice in a token included
        "W_dec_FD": leaf(height, width, dtype=dtype),
        "b_dec_D": leaf(width, dtype=dtype),
    }
    with kernels.use(path):
        got = gradients(kernels.decode, inputs)
    compare(got, gradients(reference.decode, inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_at(path: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, entries, height, width = size
    inputs = {
        "x_BD": leaf(tokens, width, dtype=dtype),
        "weight_PD": leaf(height, width, dtype=dtype),
        "bias_P": leaf(height, dtype=dtype),
        "rows_BR": torch.randint(height, (tokens, entries)),
    }

    def with_values(**tensors: Tensor) -> Tensor:
        with torch.no_grad():
            values_BR = reference.linear_at(**tensors)
        return kernels.linear_at(**tensors, values_BR=values_BR)

    with kernels.use(path):
        got = gradients(with_values, inputs)
    compare(got, gradients(reference.linear_at, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_and_selection_in_one(path: str, dtype: torch.dtype) -> None:
    inputs = {
        "x": leaf(21, 19, dtype=dtype),
        "weight": leaf(11, 7, 19, dtype=dtype),
        "bias": leaf(11, 7, dtype=dtype),
    }
    choices = [Choice(9), Choice(4, torch.arange(5, 60))]

    def fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        chosen = kernels.kronecker_linear_topk(x, weight, bias, 3, choices)
        return torch.cat([pairs.pre_BR for pairs in chosen], dim=1)

    with kernels.use(path):
        chosen = kernels.kronecker_linear_topk(inputs["x"], inputs["weight"], inputs["bias"], 3, choices)
        rows = [pairs.rows_BR for pairs in chosen]
        got = gradients(fast, inputs)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_at(x, weight.flatten(0, 1), bias.flatten(), torch.cat(rows, dim=1))

    compare(got, gradients(definition, inputs))


def test_gradcheck(path: str) -> None:
    values_BK, W_dec_FD, b_dec_D = (leaf(*shape, dtype=torch.float64) for shape in ((4, 3), (6, 5), (5,)))
    indices_BK = torch.randint(6, (4, 3))
    with kernels.use(path):
        assert torch.autograd.gradcheck(
            lambda values, W, b: kernels.decode(values, indices_BK, W, b), (values_BK, W_dec_FD, b_dec_D)
        )


def test_only_what_is_asked_for_is_computed(path: str) -> None:
    values_BK, W_dec_FD, b_dec_D = torch.randn(4, 3), torch.randn(6, 5), torch.randn(5)
    indices_BK = torch.randint(6, (4, 3))
    with kernels.use(path):
        assert not kernels.decode(values_BK, indices_BK, W_dec_FD, b_dec_D).requires_grad
        W_dec_FD.requires_grad_()
        kernels.decode(values_BK, indices_BK, W_dec_FD, b_dec_D).sum().backward()
        values_BK.requires_grad_()
        kernels.decode(values_BK, indices_BK, W_dec_FD.detach(), b_dec_D).sum().backward()
    assert W_dec_FD.grad is not None
    assert values_BK.grad is not None


def sae_loss(parameters: list[Tensor], x_BD: Tensor) -> Tensor:
    """A KronSAE's loss with a product gate."""
    W_enc, bias, W_dec, b_dec = parameters
    [pairs] = kernels.kronecker_linear_topk(x_BD, W_enc, bias, 2, [Choice(4)])
    u_BK, v_BK = pairs.pre_BR.chunk(2, dim=1)
    x_hat_BD = kernels.decode(u_BK.relu() * v_BK.relu(), pairs.selection.indices_BK, W_dec, b_dec)
    return (x_BD - x_hat_BD).square().sum(-1).mean()


def test_gradients_kept_as_entries_are_the_same_gradients(path: str) -> None:
    parameters = [leaf(*shape, dtype=torch.float64) for shape in ((7, 5, 6), (7, 5), (42, 6), (6,))]
    batches = [torch.randn(9, 6, dtype=torch.float64) for _ in range(2)]
    with kernels.use(path):
        for x_BD in batches:
            sae_loss(parameters, x_BD).backward()
        want = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        collected = kernels.RowGradients()
        for x_BD in batches:
            with kernels.collect_row_gradients(collected):
                sae_loss(parameters, x_BD).backward()
        assert parameters[0].grad is None
        assert parameters[2].grad is None
        norm = kernels.grad_norm(parameters, collected)
        collected.materialize()
        assert collected.get(parameters[0]) is None
    for parameter, gradient in zip(parameters, want, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        same_values(parameter.grad, gradient)
    torch.testing.assert_close(norm, kernels.grad_norm(parameters), rtol=1e-12, atol=0)
    squares = [float(gradient.square().sum()) for gradient in want if gradient is not None]
    torch.testing.assert_close(norm, sum(squares) ** 0.5, rtol=1e-12, atol=0)


def test_a_weight_that_is_computed_keeps_its_gradient_in_autograd() -> None:
    raw_FD = leaf(6, 5, dtype=torch.float32)
    values_BK, indices_BK = torch.randn(4, 3), torch.randint(6, (4, 3))
    for make in (lambda: raw_FD * 2, lambda: raw_FD[:4], lambda: raw_FD.reshape(10, 3).reshape(6, 5)[1:5]):
        with kernels.collect_row_gradients() as collected:
            weight_FD = make()
            kernels.decode(values_BK, indices_BK % len(weight_FD), weight_FD, torch.zeros(5)).sum().backward()
        assert raw_FD.grad is not None
        assert collected.get(raw_FD) is None
        raw_FD.grad = None


def test_the_suite_would_notice_a_wrong_gradient() -> None:
    inputs = {"x": leaf(3, 4, dtype=torch.float32)}
    with pytest.raises(AssertionError, match="gradient of x"):
        compare(
            gradients(lambda x: x * 1.0, inputs),
            (inputs["x"], gradients(lambda x: x * 1.001, inputs)[1]),
        )


def test_the_backward_pass_runs_on_the_path_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another thread, where autograd runs it for tensors on a GPU, and after the block has ended."""
    seen: list[tuple[str, str | None]] = []

    def watched(name: str, like: Tensor) -> Any:
        seen.append((name, dispatch.forced()))
        return dispatch.choose(name, like)

    monkeypatch.setattr(autograd, "choose", watched)
    values_BK, matrix_FD = torch.rand(4, 2, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    rows_BK = torch.randint(6, (4, 2))
    with kernels.use("reference"):
        out_BD = kernels.decode(values_BK, rows_BK, matrix_FD, torch.zeros(5))
        kept_BK = kernels.linear_at(out_BD, matrix_FD, torch.zeros(6, requires_grad=True), rows_BK, values_BK.detach())
    seen.clear()
    thread = Thread(target=kept_BK.sum().backward)
    thread.start()
    thread.join()
    assert {name for name, _ in seen} == {"weighted_rows", "sampled_products", "group_rows", "gradient_rows"}
    assert {path for _, path in seen} == {"reference"}
