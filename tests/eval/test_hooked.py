from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.eval import toys

from kronsae.eval.hooked import Windows, hidden_states, hidden_states_and_logits, logits, read_windows, splice


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_same_windows_whatever_the_batches(size: int) -> None:
    """Windows of 3, 1, 4 kept tokens: five tokens need the third window, and no fourth."""
    windows = [[1, 2, 2, 2], [1, 3], [1, 4, 4, 4, 4], [1, 5]]
    found = read_windows(toys.batches(windows, size), 5)
    assert sum(part.num_kept for part in found) == 8
    rows = [part.input_ids_ST[row][part.attention_mask_ST[row]].tolist() for part in found for row in range(len(part))]
    assert rows == windows[:3]
    assert [part.first for part in found] == [n * size for n in range(len(found))]


def test_a_stream_is_read_no_further_than_needed() -> None:
    def stream() -> Iterator[tuple[toys.ToyBatch, None]]:
        yield from toys.batches([[1, 2, 2]] * 3, 1)()
        raise AssertionError("read on")

    assert len(read_windows(stream, 5)) == 3


def test_a_short_stream_gives_what_it_has() -> None:
    assert sum(part.num_kept for part in read_windows(toys.batches([[1, 2]], 1), 100)) == 1


def test_splice_replaces_what_counts_in_order() -> None:
    windows = Windows(
        torch.tensor([[1, 2, 3], [1, 4, 0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
        torch.tensor([[False, True, True], [False, True, False]]),
        0,
    )
    rows = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]])
    spliced = splice(torch.full((2, 3, 2), -1.0), windows, rows)
    assert spliced.tolist() == [
        [[-1, -1], [10, 11], [20, 21]],
        [[-1, -1], [30, 31], [-1, -1]],
    ]


def test_the_pass_ends_at_the_hook() -> None:
    model, hook = toys.language_model(10, 4)
    (windows,) = read_windows(toys.batches([[1, 2, 3]], 1), 9)
    hidden = hidden_states(model, hook, windows)
    assert model.model.passes_to_the_end == 0
    assert torch.equal(hidden, model.model.embedding(torch.tensor([[1, 2, 3]])))
    both, clean = hidden_states_and_logits(model, hook, windows)
    assert torch.equal(both, hidden)
    assert torch.equal(logits(model, hook, windows, hidden), clean)
    assert not model.model.block._forward_hooks


def test_hooks_are_removed_after_an_error() -> None:
    model, hook = toys.language_model(10, 4)
    (windows,) = read_windows(toys.batches([[1, 2, 3]], 1), 9)
    with pytest.raises(ValueError, match=r"must keep the shape \(1, 3, 4\); got \(1, 3, 5\)"):
        logits(model, hook, windows, torch.zeros(1, 3, 5))
    assert not model.model.block._forward_hooks
