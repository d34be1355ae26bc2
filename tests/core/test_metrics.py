from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronsae.core.metrics import ExplainedVariance, explained_variance, explained_variance_per_token

X = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # mean (2, 2); squared distances from it 5 and 5
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 2.0]])  # squared errors 1 and 4


def draw(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(seed))
    return x, x + 0.3 * noise


def test_by_hand() -> None:
    assert explained_variance(X, X_HAT) == pytest.approx(1 - 5 / 10)
    metric = ExplainedVariance()
    metric.update(X, X_HAT)
    assert metric.value() == pytest.approx(0.5)
    assert metric.mean_squared_error() == pytest.approx(2.5)
    assert metric.mean_D.tolist() == [2.0, 2.0]
    assert metric.tokens == 2


def test_per_token_by_hand() -> None:
    per_token = explained_variance_per_token(X, X_HAT, torch.tensor([2.0, 2.0]))
    assert per_token.tolist() == pytest.approx([1 - 1 / 5, 1 - 4 / 5])
    # the two readings differ as soon as tokens lie at different distances from the mean
    x_BD = torch.tensor([[0.0], [1.0], [5.0]])
    x_hat_BD = x_BD + torch.tensor([[1.0], [0.0], [0.0]])
    assert explained_variance(x_BD, x_hat_BD) == pytest.approx(1 - 1 / 14)
    per_token = explained_variance_per_token(x_BD, x_hat_BD, x_BD.mean(0))
    assert per_token.mean().item() == pytest.approx(1 - (1 / 4) / 3)


def test_anchors() -> None:
    x_BD, _ = draw(100)
    assert explained_variance(x_BD, x_BD) == 1.0
    assert explained_variance(x_BD, x_BD.mean(0).expand_as(x_BD)) == pytest.approx(0, abs=1e-6)
    assert explained_variance(x_BD, -x_BD) < 0


def test_a_constant_error_counts() -> None:
    """The mean of the error is not subtracted: a reconstruction that is off by a constant is not perfect."""
    x_BD, _ = draw(100)
    assert explained_variance(x_BD, x_BD + 1) < 0.1


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_streaming_equals_all_at_once(sizes: list[int], seed: int) -> None:
    x_BD, x_hat_BD = draw(sum(sizes) + 2, seed)
    metric = ExplainedVariance()
    for x, x_hat in zip(x_BD.split([2, *sizes]), x_hat_BD.split([2, *sizes]), strict=True):
        metric.update(x, x_hat)
    assert metric.tokens == len(x_BD)
    assert metric.value() == pytest.approx(explained_variance(x_BD, x_hat_BD), rel=1e-12)
    assert metric.mean_squared_error() == pytest.approx((x_BD - x_hat_BD).double().square().sum(1).mean().item())
    torch.testing.assert_close(metric.mean_D, x_BD.double().mean(0), rtol=0, atol=1e-14)


def test_a_large_mean_costs_no_accuracy() -> None:
    """Mean 1e6 and spread 1: the sum of squares minus the square of the sum would lose 12 of 16 digits."""
    x_BD, x_hat_BD = (part.double() for part in draw(4000))
    expected = explained_variance(x_BD, x_hat_BD)
    metric = ExplainedVariance()
    for x, x_hat in zip(x_BD.split(300), x_hat_BD.split(300), strict=True):
        metric.update(x + 1e6, x_hat + 1e6)
    assert metric.value() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constant", [0.0, 0.1, -7e8 / 3])
def test_activations_that_do_not_vary_explain_nothing(constant: float, dtype: torch.dtype) -> None:
    metric = ExplainedVariance()
    for tokens in (3, 77, 1000):
        x_BD = torch.full((tokens, 9), constant, dtype=dtype)
        metric.update(x_BD, x_BD + 1)
    assert math.isnan(metric.value())


def test_one_token_does_not_vary() -> None:
    assert math.isnan(explained_variance(torch.ones(1, 3), torch.zeros(1, 3)))


def test_small_variance_is_variance() -> None:
    """One coordinate of one token in 10,000 is off by one float32 step."""
    x_BD = torch.ones(10_000, 50)
    x_BD[17, 3] += torch.finfo(torch.float32).eps
    assert explained_variance(x_BD, x_BD) == 1.0


def test_nothing_seen() -> None:
    metric = ExplainedVariance()
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    assert math.isnan(metric.value())
    with pytest.raises(ValueError, match=r"^mean_D needs at least one batch; got none\.$"):
        _ = metric.mean_D


def test_an_empty_batch_changes_nothing() -> None:
    metric = ExplainedVariance()
    metric.update(X[:0], X_HAT[:0])
    metric.update(X, X_HAT)
    metric.update(X[:0], X_HAT[:0])
    assert metric.value() == pytest.approx(0.5)


def test_the_graph_is_not_kept() -> None:
    x_BD, x_hat_BD = draw(10)
    metric = ExplainedVariance()
    metric.update(x_BD.requires_grad_(), x_hat_BD.requires_grad_())
    assert not metric.mean_D.requires_grad


def test_half_precision_input_is_summed_in_double() -> None:
    x_BD, x_hat_BD = (part.bfloat16() for part in draw(3000))
    assert explained_variance(x_BD, x_hat_BD) == explained_variance(x_BD.double(), x_hat_BD.double())
