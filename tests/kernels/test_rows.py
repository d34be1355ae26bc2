"""Sums over weight rows, both ways, and gradients kept as entries: every path against its definition."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.helpers import operation, same_values
from torch import Tensor

from kronsae.kernels import Choice, reference
from kronsae.kernels.rows import RowGradient, Term

SIZES = [(1, 1, 1, 1), (5, 3, 7, 13), (33, 9, 50, 17), (64, 32, 300, 96), (3, 40, 2, 31)]  # B, R, P, D
DTYPES = [torch.float32, torch.float64]


def case(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights with zeros among them, rows that repeat within a token, a matrix, inputs."""
    tokens, entries, height, width = size
    weights_BR = torch.randn(tokens, entries, dtype=dtype)
    weights_BR[torch.rand(tokens, entries) < 0.2] = 0
    rows_BR = torch.randint(height, (tokens, entries))
    return weights_BR, rows_BR, torch.randn(height, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_weighted_rows(path: str, size: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    weights_BR, rows_BR, matrix_PD, _ = case(size, dtype)
    bias_D = torch.randn(size[3], dtype=dtype) if with_bias else None
    got = operation(path, "weighted_rows")(weights_BR, rows_BR, matrix_PD, bias_D)
    same_values(got, reference.weighted_rows(weights_BR, rows_BR, matrix_PD, bias_D))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_products(path: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    _, rows_BR, matrix_PD, x_BD = case(size, dtype)
    got = operation(path, "sampled_products")(x_BD, matrix_PD, rows_BR)
    same_values(got, reference.sampled_products(x_BD, matrix_PD, rows_BR))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_rows(path: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    weights_BR, rows_BR, matrix_PD, x_BD = case(size, dtype)
    height = len(matrix_PD)
    gradient = operation(path, "group_rows")([Term(weights_BR, rows_BR, x_BD)], height)
    assert gradient.height == height
    want = torch.zeros(len(x_BD), height, dtype=dtype).scatter_add(1, rows_BR, weights_BR).T @ x_BD
    same_values(operation(path, "gradient_rows")(gradient), want)
    squared = operation(path, "squared_norm")(gradient)
    assert squared.dtype == torch.float64
    torch.testing.assert_close(squared, want.double().square().sum(), rtol=1e-6, atol=1e-30)


def test_grouping_is_one_definite_order(path: str) -> None:
    terms = []
    for size in ((7, 5), (4, 3)):
        weights_BR, rows_BR, _, x_BD = case((*size, 9, 6), torch.float32)
        terms.append(Term(weights_BR, rows_BR, x_BD))
    got, want = (operation(name, "group_rows")(terms, 9) for name in (path, "reference"))
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.tokens_N, want.tokens_N)
    assert torch.equal(got.weights_N, want.weights_N)
    assert torch.equal(got.x_BD, want.x_BD)


def test_rows_without_entries_are_zero_even_in_poisoned_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def poisoned(*sizes: object, **options: object) -> Tensor:
        memory: Tensor = plain(*sizes, **options)  # type: ignore[call-overload]
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    x_BD, matrix_PD = torch.randn(3, 5), torch.randn(8, 5)
    weights_BR, rows_BR = torch.ones(3, 1), torch.full((3, 1), 4)
    gradient = operation(path, "group_rows")([Term(weights_BR, rows_BR, x_BD)], 8)
    dense = operation(path, "gradient_rows")(gradient)
    assert torch.equal(dense[4], x_BD.sum(0)) or (dense[4] - x_BD.sum(0)).abs().max() < 1e-6
    assert dense[:4].eq(0).all()
    assert dense[5:].eq(0).all()
    assert not operation(path, "weighted_rows")(weights_BR, rows_BR, matrix_PD).isnan().any()
    assert not operation(path, "sampled_products")(x_BD, matrix_PD, rows_BR).isnan().any()
    chosen = operation(path, "kronecker_topk")(torch.randn(3, 4, 5), 2, 24)
    assert min(int(part.min()) for part in chosen) >= 0
    [pairs] = operation(path, "kronecker_linear_topk")(x_BD, torch.randn(4, 5, 5), torch.zeros(4, 5), 2, [Choice(24)])
    assert not pairs.pre_BR.isnan().any()


def test_no_entries_at_all(path: str) -> None:
    term = Term(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4))
    gradient: RowGradient = operation(path, "group_rows")([term], 5)
    assert len(gradient.tokens_N) == 0
    assert operation(path, "gradient_rows")(gradient).eq(0).all()
    assert float(operation(path, "squared_norm")(gradient)) == 0
