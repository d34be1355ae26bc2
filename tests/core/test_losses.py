"""Test Matryoshka's groups and their errors; test_cells compares the loss with its definition."""

from __future__ import annotations

import pytest
import torch

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.losses import MatryoshkaConfig, matryoshka_groups, within
from kronsae.support.errors import UserError

KRON = KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3)


@pytest.mark.parametrize("doublings", range(6))
def test_groups_double_every_prefix(doublings: int) -> None:
    groups = matryoshka_groups(32 * 2**doublings, 32)
    ends = [sum(groups[: i + 1]) for i in range(len(groups))]
    assert ends == [32 * 2**i for i in range(doublings + 1)]


@pytest.mark.parametrize("smallest", [3, 24, 64])
def test_groups_that_cannot_double_are_refused(smallest: int) -> None:
    with pytest.raises(UserError) as error:
        matryoshka_groups(32, smallest)
    assert str(error.value) == (
        f"smallest must be d_sae divided by a power of 2; got smallest={smallest} with d_sae=32. "
        "Change it, or give the groups themselves."
    )


def test_groups_must_cover_the_dictionary_and_part_no_head() -> None:
    MatryoshkaConfig(groups=(12, 6, 6)).check(KRON)
    MatryoshkaConfig(groups=(1, 22, 1)).check(DenseEncoderConfig(d_sae=24))
    with pytest.raises(UserError) as error:
        MatryoshkaConfig(groups=(12, 6)).check(KRON)
    assert str(error.value) == "groups must sum to d_sae; got 12 + 6 = 18 with d_sae=24. Change one."
    with pytest.raises(UserError) as error:
        MatryoshkaConfig(groups=(8, 16)).check(KRON)
    assert str(error.value) == (
        "groups must end at head boundaries, multiples of d_base * d_extension = 6; "
        "got 8 + 16, where a group ends at 8."
    )
    with pytest.raises(UserError, match=r"^groups must be a whole number above 0; got 0\.$"):
        MatryoshkaConfig(groups=(24, 0))


def test_within_keeps_one_group_in_few_columns() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 7.0]], requires_grad=True)
    codes = SparseCodes(values, torch.tensor([[9, 2, 3, 0], [0, 8, 7, 4]]), d_sae=10)
    part = within(codes, 2, 5)
    assert part.values.shape == (2, 2)
    assert sorted(part.indices[0].tolist()) == [2, 3]
    inside = torch.zeros(10).index_fill(0, torch.arange(2, 5), 1.0)
    assert torch.equal(part.to_dense(), codes.to_dense() * inside)
    part.values.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    assert within(codes, 5, 7).to_dense().count_nonzero() == 0
    assert within(codes.reshape(2, 1), 0, 1).values.shape == (2, 1, 1)
