from __future__ import annotations

import pytest
import torch
from tests.eval.toys import kron_sae, perfect_sae, zero_sae

from kronsae.core.metrics import explained_variance
from kronsae.eval import Reconstruction, reconstruction
from kronsae.eval.reconstruction import ReconstructionMeter, encode_decode
from kronsae.support.errors import UserError


def test_by_hand() -> None:
    """Tokens (1, 0) and (3, 4) around their mean (2, 2); the SAE knows only the first coordinate."""
    sae = perfect_sae(2)
    with torch.no_grad():
        sae.decoder.W_dec[1] = 0
    found = reconstruction(sae, [torch.tensor([[1.0, 0.0], [3.0, 4.0]])])
    assert found.tokens == 2
    assert found.mean_squared_error == pytest.approx((0 + 16) / 2)
    assert found.explained_variance == pytest.approx(1 - 16 / (5 + 5))
    assert found.explained_variance_per_token == pytest.approx(((1 - 0 / 5) + (1 - 16 / 5)) / 2)
    assert found.cosine_similarity == pytest.approx((1 + 3 / 5) / 2)
    assert found.l0 == pytest.approx((1 + 2) / 2)
    assert found.dead_share == pytest.approx(2 / 4)  # the two negative directions


def test_the_two_explained_variances_weigh_tokens_differently() -> None:
    """One token far out and badly reconstructed, two near the mean and exact."""
    sae = perfect_sae(1)
    with torch.no_grad():
        sae.encoder.bias[0] = -1.0  # a positive x comes back as x - 1
    x_BD = torch.tensor([[-1.0], [-0.5], [6.0]])  # mean 1.5; squared distances 6.25, 4, 20.25
    found = reconstruction(sae, [x_BD])
    assert found.explained_variance == pytest.approx(1 - 1 / 30.5)
    assert found.explained_variance_per_token == pytest.approx(1 - (1 / 20.25) / 3)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_streaming_equals_all_at_once(size: int) -> None:
    sae, x_BD = kron_sae(5), torch.randn(64, 5)
    whole, parts = reconstruction(sae, [x_BD]), reconstruction(sae, x_BD.split(size))
    assert parts.to_dict() == pytest.approx(whole.to_dict(), rel=1e-6)
    assert whole.explained_variance == pytest.approx(explained_variance(x_BD, encode_decode(sae, x_BD)[0]))


def test_perfect_and_zero() -> None:
    x_BD = torch.randn(50, 4)
    assert reconstruction(perfect_sae(4), [x_BD]).explained_variance == pytest.approx(1)
    zero = reconstruction(zero_sae(4), [x_BD])
    assert zero.mean_squared_error == pytest.approx(float(x_BD.square().sum(1).mean()))
    assert zero.cosine_similarity == 0


def test_activations_that_do_not_vary_have_no_explained_variance() -> None:
    found = reconstruction(perfect_sae(2), [torch.ones(3, 2)])
    assert found.explained_variance is None
    assert found.explained_variance_per_token is None
    assert found.mean_squared_error == 0


def test_a_token_at_the_mean_is_left_out_of_the_mean_over_tokens() -> None:
    found = reconstruction(perfect_sae(1), [torch.tensor([[-1.0], [0.0], [1.0]])])
    assert found.explained_variance_per_token == pytest.approx(1)


def test_half_precision_is_measured_in_double() -> None:
    x_BD = 100 + torch.randn(4096, 3).to(torch.bfloat16)
    found = reconstruction(perfect_sae(3), [x_BD])
    assert found.explained_variance == pytest.approx(1)


def test_bad_input() -> None:
    with pytest.raises(UserError, match="iterable twice; got a one-shot generator"):
        reconstruction(perfect_sae(2), (torch.ones(1, 2) for _ in range(2)))
    with pytest.raises(UserError, match="needs at least one token"):
        reconstruction(perfect_sae(2), [])
    with pytest.raises(UserError, match="d_in=2"):
        reconstruction(perfect_sae(2), [torch.ones(1, 3)])


def test_without_a_second_pass_there_is_no_figure_per_token() -> None:
    sae, x_BD = perfect_sae(2), torch.randn(9, 2)
    meter = ReconstructionMeter(sae.d_sae)
    meter.update(x_BD, *encode_decode(sae, x_BD))
    assert isinstance(meter.value(), Reconstruction)
    assert meter.value().explained_variance_per_token is None
