from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from kronsae.core.encoders import DenseEncoderConfig, KroneckerEncoderConfig
from kronsae.core.metrics import explained_variance
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import JumpReLUConfig, TopKConfig
from kronsae.eval.ladder import best_values, ladder, matching_pursuit
from kronsae.kernels import Choice
from kronsae.support.errors import UserError


def build(k: int = 3, d_sae: int = 24) -> SAE:
    encoder = DenseEncoderConfig(d_sae=d_sae)
    sae = SAEConfig(d_in=8, encoder=encoder, sparsifier=TopKConfig(k=k)).build(2).double()
    with torch.no_grad():
        sae.decoder.W_dec.mul_(torch.rand(d_sae, 1, dtype=torch.float64) + 0.5)
        sae.decoder.b_dec.normal_(std=0.1)
    return sae


def inputs(tokens: int = 40) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def least_squares(x_D: Tensor, rows_KD: Tensor) -> float:
    """The least squared error of non-negative values: the best of the unconstrained solutions of all subsets."""
    best = float(x_D.square().sum())
    for size in range(1, len(rows_KD) + 1):
        for places in combinations(range(len(rows_KD)), size):
            rows = rows_KD[list(places)]
            z_K = torch.linalg.lstsq(rows.T, x_D.unsqueeze(1)).solution.squeeze(1)
            if bool((z_K >= 0).all()):
                best = min(best, float((x_D - z_K @ rows).square().sum()))
    return best


@torch.no_grad()
def test_best_values_are_the_best_of_all_subsets() -> None:
    sae, x_BD = build(k=4), inputs(12)
    codes = sae.encode(x_BD)
    target_BD = x_BD - sae.b_dec
    z_BK = best_values(target_BD, sae.W_dec, codes.indices, codes.active)
    assert (z_BK >= 0).all()
    assert (z_BK[~codes.active] == 0).all()
    for b in range(12):
        rows_KD = sae.W_dec[codes.indices[b]][codes.active[b]]
        got = float((target_BD[b] - z_BK[b] @ sae.W_dec[codes.indices[b]]).square().sum())
        assert got == pytest.approx(least_squares(target_BD[b], rows_KD), rel=1e-5)


@torch.no_grad()
def test_matching_pursuit_takes_the_best_row_each_time() -> None:
    """Against a loop over one token, whose values are those of least squares over all subsets."""
    sae, x_BD = build(), inputs(8)
    codes = matching_pursuit(sae, x_BD, 3)
    unit_FD = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    for b in range(8):
        chosen: list[int] = []
        target_D, error_D = x_BD[b] - sae.b_dec, x_BD[b] - sae.b_dec
        for _ in range(3):
            fit_F = unit_FD @ error_D
            fit_F[chosen] = -torch.inf
            chosen.append(int(fit_F.argmax()))
            rows = torch.tensor([chosen])
            z_1K = best_values(target_D.unsqueeze(0), sae.W_dec, rows, torch.ones_like(rows, dtype=torch.bool))
            error_D = target_D - z_1K[0] @ sae.W_dec[chosen]
        assert codes.indices[b].tolist() == chosen
        torch.testing.assert_close(codes.values[b], z_1K[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_all_latents_as_candidates_are_all_latents() -> None:
    sae, x_BD = build(), inputs()
    with torch.no_grad():
        sae.encoder.bias.fill_(100.0)  # every latent is positive
    candidates = sae.encoder(x_BD).choose(Choice(24))[0]
    some, every = matching_pursuit(sae, x_BD, 3, candidates), matching_pursuit(sae, x_BD, 3)
    assert torch.equal(some.indices, every.indices)


@pytest.mark.parametrize(
    "encoder", [DenseEncoderConfig(d_sae=24), KroneckerEncoderConfig(num_heads=4, d_base=2, d_extension=3)]
)
def test_the_rungs(encoder: DenseEncoderConfig | KroneckerEncoderConfig) -> None:
    sae = SAEConfig(d_in=8, encoder=encoder, sparsifier=TopKConfig(k=3)).build(2).double()
    x_BD = inputs(200)
    found = ladder(sae, [x_BD[:150], x_BD[150:]])
    assert (found.tokens, found.k) == (200, 3)
    assert found.encoded == pytest.approx(explained_variance(x_BD, sae(x_BD)))
    assert found.encoded < found.one_step < found.best_values < found.among_2k
    assert found.best_values < found.among_all
    assert found.encoded < found.pursuit
    assert sum(found.lost_by.values()) == pytest.approx(1 - found.encoded)
    assert list(found.lost_by) == ["values", "ranking", "recall", "dictionary"]


def test_a_dictionary_that_has_it_all_loses_nothing() -> None:
    """Tokens of three rows at right angles: pursuit over all latents finds them whatever the encoder says."""
    sae = build(d_sae=8)
    with torch.no_grad():
        sae.decoder.W_dec.copy_(torch.eye(8))
        sae.decoder.b_dec.zero_()
    order_BF = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)).argsort(1)
    x_BD = torch.zeros(50, 8, dtype=torch.float64).scatter_(1, order_BF[:, :3], 1.0)
    found = ladder(sae, [x_BD])
    assert found.among_all == pytest.approx(1)
    assert found.lost_by["dictionary"] == pytest.approx(0)
    assert found.encoded < 1


def test_saes_without_a_fixed_k_are_refused() -> None:
    sae = SAEConfig(d_in=8, encoder=DenseEncoderConfig(d_sae=24), sparsifier=JumpReLUConfig(k=3)).build()
    with pytest.raises(UserError, match="pursuit shares out a k that is the same for every token"):
        ladder(sae, [inputs().float()])
