"""Test single operations: sums of gradients, merged selections with ties, and the storage of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.distributed import parts
from tests.distributed.processes import in_processes

from kronsae.core.encoders import first_by_rank
from kronsae.distributed.gradients import Layout, joined_terms, traffic_of_sum, traffic_of_terms
from kronsae.kernels import Choice, use


@pytest.mark.parametrize("gathered", [True, False], ids=["lists", "dense"])
def test_gradients_are_summed_as_lists_or_dense(gathered: bool, tmp_path: Path) -> None:
    for result in in_processes(3, parts.sum_gradients, tmp_path, gathered):
        assert not isinstance(result, BaseException), result.__notes__
        torch.testing.assert_close(result["weight"], parts.dense_of(parts.terms()), rtol=1e-12, atol=1e-12)
        assert torch.equal(result["bias"], torch.arange(parts.F, dtype=torch.float64) * 6)
        assert torch.equal(result["only_first"], torch.ones(3, dtype=torch.float64))
        assert (result["sent"], result["kept"]) == (3, 5 if gathered else 0)  # two terms, and one without tokens


def test_the_traffic_of_both_forms() -> None:
    """By hand: B = 100 tokens a process, K = 7 entries of 4 + 4 bytes and a vector of 32 numbers, two processes."""
    weight = torch.zeros(1000, 32)
    layouts = [Layout(False, 1, ((100, 7),)), Layout(False, 1, ((60, 7),))]
    assert traffic_of_terms(layouts, weight) == 2 * 100 * (7 * 8 + 32 * 4)
    assert traffic_of_sum(weight) == 2 * 1000 * 32 * 4


def test_terms_that_share_their_vectors_are_joined() -> None:
    some = parts.terms()
    joined = joined_terms(some)
    assert [tuple(term.weights_BR.shape) for term in joined] == [(parts.TOKENS, 5), (parts.TOKENS, 4)]
    torch.testing.assert_close(parts.dense_of(tuple(joined)), parts.dense_of(some))


def test_a_divided_selection_breaks_ties_as_one_process_does(tmp_path: Path) -> None:
    encoder, x_BD = parts.tied_sae()
    with use("reference"):
        chosen = encoder(x_BD).choose(Choice(5), Choice(3, parts.DEAD), Choice(2, parts.DEAD[parts.DEAD < 16]))
    expected = [parts.active(codes) for codes in chosen]
    values = chosen[0].values
    assert float((values[:, :1] == values).float().mean()) > 0.5  # there are ties
    for result in in_processes(2, parts.choose_among_ties, tmp_path):
        assert not isinstance(result, BaseException), result.__notes__
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


@pytest.mark.parametrize("total", [2, 6, 20])
def test_ties_of_a_batch_go_to_the_earlier_token(total: int, tmp_path: Path) -> None:
    whole = parts.offer_with_ties(torch.ones(6, dtype=torch.bool))
    rank_N = whole.rank_BK.flatten()
    order = rank_N.argsort(stable=True, descending=True)[:total]
    expected = sorted(order[rank_N[order] > 0].tolist())
    for result in in_processes(2, parts.ties_of_batch, tmp_path, total):
        assert not isinstance(result, BaseException), result.__notes__
        assert sorted(result.tolist()) == expected


def test_order_by_rank_and_index() -> None:
    rank = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    index = torch.tensor([[4, 9, 2, 0, 5]])
    assert index.gather(1, first_by_rank(rank, index)).tolist() == [[2, 5, 9, 4, 0]]
