"""Means over the tokens of each text, against dense arrays."""

from __future__ import annotations

import torch

from kronsae.core.codes import SparseCodes
from kronsae.eval.probing.pooling import mean_activations, mean_codes


def test_means_are_those_of_the_dense_codes() -> None:
    """Texts of 3, 1 and 4 tokens, with padding, latents that occur on several tokens, and one text without any."""
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, 1.0], [1.0, 1.0], [2.0, 5.0], [0, 0]])
    indices = torch.tensor([[0, 5], [5, 1], [0, 0], [2, 2], [3, 0], [0, 3], [4, 0], [0, 0]])
    codes, sizes = SparseCodes(values, indices, 6), [3, 1, 4]
    found = mean_codes(codes, sizes)
    expected = torch.stack([part.mean(0) for part in codes.to_dense().split(sizes)])
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_activations(codes.to_dense(), sizes), expected, rtol=0, atol=0)
    assert found.values.shape == (3, 3)
    assert [row.count_nonzero().item() for row in found.values] == [2, 0, 3]
    assert found.indices[0, :2].tolist() == [0, 5]


def test_one_text_without_activations() -> None:
    found = mean_codes(SparseCodes(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), 4), [2])
    assert found.values.shape == (1, 0)
    assert found.to_dense().tolist() == [[0.0] * 4]
