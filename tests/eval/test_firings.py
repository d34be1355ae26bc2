from __future__ import annotations

import numpy as np
import pytest
import torch

from kronsae.core.codes import SparseCodes
from kronsae.eval.firings import FiringMeter, flat_text
from kronsae.eval.hooked import Windows


def windows(rows: list[list[int]], first: int = 0, bos: int = 1) -> Windows:
    """Rows of ids, padded with 0; ``bos`` does not count."""
    length = max(map(len, rows))
    ids_ST = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)
    return Windows(ids_ST, ids_ST > 0, (ids_ST > 0) & (ids_ST != bos), first)


PARTS = [windows([[1, 5, 6, 7], [1, 8]]), windows([[1, 9, 5]], first=2)]


def test_flat_text_by_hand() -> None:
    text = flat_text(PARTS)
    assert text.ids_L.tolist() == [1, 5, 6, 7, 1, 8, 1, 9, 5]
    assert text.start_L.tolist() == [0, 0, 0, 0, 4, 4, 6, 6, 6]
    assert text.stop_L.tolist() == [4, 4, 4, 4, 6, 6, 9, 9, 9]
    assert text.kept_N.tolist() == [1, 2, 3, 5, 7, 8]
    first, stop = text.around(np.array([1, 3, 5, 8]), 2)
    assert list(zip(first.tolist(), stop.tolist(), strict=True)) == [(0, 4), (1, 4), (4, 6), (6, 9)]


def test_firings_by_hand() -> None:
    """Kept tokens 0-3 come with the first part, 4 and 5 with the second; a value of 0 is padding."""
    meter = FiringMeter(6, [4, 2, 5])
    indices = torch.tensor([[2, 0], [4, 2], [2, 1], [3, 4]])
    meter.update(SparseCodes(torch.tensor([[1.0, 9.0], [2.0, 3.0], [0.0, 1.0], [1.0, 4.0]]), indices, 6))
    meter.update(SparseCodes(torch.tensor([[5.0], [6.0]]), torch.tensor([[2], [4]]), 6))
    found = meter.value(flat_text(PARTS))
    assert list(found) == [4, 2, 5]
    assert (found[2].places_E.tolist(), found[2].values_E.tolist()) == ([1, 2, 7], [1.0, 3.0, 5.0])
    assert (found[4].places_E.tolist(), found[4].values_E.tolist()) == ([2, 5, 8], [2.0, 4.0, 6.0])
    assert len(found[5].places_E) == 0
    assert found[2].active(0, 4).tolist() == [False, True, True, False]
    assert found[2].within(np.array([0, 3, 2]), np.array([4, 7, 8])).tolist() == [2, 0, 2]


def test_firings_do_not_depend_on_the_batches() -> None:
    values, indices = (
        torch.rand(6, 3) * (torch.rand(6, 3) > 0.3),
        torch.stack([torch.randperm(9)[:3] for _ in range(6)]),
    )
    text = flat_text(PARTS)
    found = []
    for cuts in ([6], [1, 2, 3], [5, 1]):
        meter = FiringMeter(9, range(9))
        for value, index in zip(values.split(cuts), indices.split(cuts), strict=True):
            meter.update(SparseCodes(value, index, 9))
        found.append(meter.value(text))
    dense = SparseCodes(values, indices, 9).to_dense()
    for one in found:
        for latent in range(9):
            assert one[latent].places_E.tolist() == text.kept_N[dense[:, latent].numpy() > 0].tolist()
            assert one[latent].values_E.tolist() == dense[dense[:, latent] > 0, latent].tolist()


def test_codes_of_another_text_are_refused() -> None:
    meter = FiringMeter(3, [0])
    meter.update(SparseCodes(torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int64), 3))
    with pytest.raises(ValueError, match="text must have one kept token per activation; got 6 for 5"):
        meter.value(flat_text(PARTS))
