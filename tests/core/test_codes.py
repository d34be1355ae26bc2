from __future__ import annotations

import jaxtyping
import pytest
import torch

from kronsae.core.codes import SparseCodes


@pytest.fixture
def codes() -> SparseCodes:
    values = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    return SparseCodes(values, torch.tensor([[3, 1, 0], [4, 0, 3], [0, 1, 2]]), d_sae=5)


def test_dense_form(codes: SparseCodes) -> None:
    dense = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(codes.to_dense(), dense)


def test_zero_is_padding_in_every_count(codes: SparseCodes) -> None:
    assert codes.active.sum(-1).tolist() == [2, 1, 0]
    assert codes.l0().item() == 1.0
    assert codes.counts().tolist() == [1, 0, 0, 2, 0]
    assert codes.counts().tolist() == (codes.to_dense() > 0).sum(0).tolist()


def test_leading_dimensions(codes: SparseCodes) -> None:
    wide = codes.reshape(1, 3, 1)
    assert wide.values.shape == wide.indices.shape == (1, 3, 1, 3)
    assert torch.equal(wide.to_dense(), codes.to_dense().reshape(1, 3, 1, 5))
    assert torch.equal(wide.counts(), codes.counts())
    assert torch.equal(wide.l0(), codes.l0())
    assert torch.equal(wide.reshape(-1).values, codes.values)


def test_dense_form_is_differentiable_in_the_values(codes: SparseCodes) -> None:
    values = codes.values.clone().requires_grad_()
    weight = torch.arange(15.0).reshape(3, 5)
    (SparseCodes(values, codes.indices, 5).to_dense() * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight.gather(1, codes.indices))


def test_shape_annotations_are_checked_while_tests_run() -> None:
    """tests/conftest.py switches it on; without it the annotations would be comments."""
    with pytest.raises(jaxtyping.TypeCheckError):
        SparseCodes(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64), d_sae=5)
