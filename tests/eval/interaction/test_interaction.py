from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tests.eval import toys
from torch import Tensor

from kronsae.core.codes import SparseCodes
from kronsae.core.encoders import KroneckerEncoder, KroneckerEncoderConfig
from kronsae.core.heads import HeadGrid
from kronsae.core.sae import SAE, SAEConfig
from kronsae.core.sparsifiers import TopKConfig
from kronsae.eval.interaction import (
    ByKind,
    CorrelationMeter,
    FidelityMeter,
    HeadSample,
    HeadValues,
    ParentScale,
    Spread,
    activation_mass,
    cosines,
    effective_number,
    inheritance,
    living_cells,
    meanings,
    pearson,
    sample_heads,
    shown_grids,
)
from kronsae.eval.interaction.correlation import pairs
from kronsae.eval.interaction.fidelity import RATIOS, THRESHOLDS, TOP_SHARES
from kronsae.eval.latents import LatentMeter, LatentStatistics
from kronsae.eval.profiles import Profile


def kron_encoder(sae: SAE) -> KroneckerEncoder:
    encoder = sae.encoder
    assert isinstance(encoder, KroneckerEncoder)
    return encoder


# --- the sample -------------------------------------------------------------------------------------------------


def test_heads_are_drawn_with_a_seed_up_to_so_many_cells() -> None:
    drawn = sample_heads(1000, 8, 80, seed=0)
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn) == sample_heads(1000, 8, 80, seed=0)
    assert drawn != sample_heads(1000, 8, 80, seed=1)
    assert sample_heads(5, 8, 80, seed=0) == [0, 1, 2, 3, 4]
    assert len(sample_heads(5, 64, 10, seed=0)) == 1


def test_sampled_values_are_those_of_the_encoder() -> None:
    sae, x_BD = toys.kron_sae(5), torch.randn(40, 5)
    encoder, codes = kron_encoder(sae), sae.encode(x_BD)
    heads = [1, 4, 5]
    values = HeadSample(encoder, heads).of(x_BD, codes)
    u_BHM, v_BHN = encoder.pre_latents(x_BD)
    torch.testing.assert_close(values.u_BRM, u_BHM[:, heads])
    torch.testing.assert_close(values.v_BRN, v_BHN[:, heads])
    latents_C = HeadSample(encoder, heads).latents_C
    torch.testing.assert_close(values.composed_BC, encoder(x_BD).materialize()[:, latents_C])
    torch.testing.assert_close(values.kept_BC, codes.to_dense()[:, latents_C])
    sample = HeadSample(encoder, heads)
    weight_PD = encoder.weight.flatten(0, 1)
    torch.testing.assert_close(weight_PD[sample.base_rows], encoder.W_base[heads].flatten(0, 1))
    torch.testing.assert_close(weight_PD[sample.extension_rows], encoder.W_extension[heads].flatten(0, 1))


# --- correlation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 17, 300])
def test_correlations_are_numpys(size: int) -> None:
    grid = HeadGrid(2, 2, 3)
    values_BC = torch.randn(300, 12).relu() * torch.rand(12)
    values_BC[:, 1] += values_BC[:, 0]
    values_BC[:, 7] = 0  # never active
    values_BC[:, 8] = 0.3  # always the same
    meter = CorrelationMeter(grid)
    for part_BC in values_BC.split(size):
        meter.update(part_BC)
    found_CC = meter.matrix()
    assert found_CC[7].isnan().all()
    assert found_CC[8].isnan().all()
    vary = [column for column in range(12) if column not in (7, 8)]
    expected = np.corrcoef(values_BC[:, vary].double().numpy(), rowvar=False)
    torch.testing.assert_close(found_CC[vary][:, vary], torch.tensor(expected), rtol=0, atol=1e-9)
    within = [found_CC[i, j] for i, j in itertools.combinations(vary, 2) if i // 6 == j // 6]
    between = [found_CC[i, j] for i, j in itertools.combinations(vary, 2) if i // 6 != j // 6]
    value = meter.value()
    assert value.within.number == len(within)
    assert value.between.number == len(between)
    assert value.within.mean == pytest.approx(float(torch.stack(within).mean()), rel=1e-5)
    assert value.between.mean_abs == pytest.approx(float(torch.stack(between).abs().mean()), rel=1e-5)


def test_pairs_by_hand() -> None:
    """Heads 0 and 1 with cells (0,0) (0,1) (1,0) (1,1)."""
    found = {
        name: {tuple(pair) for pair in mask_CC.nonzero().tolist()} for name, mask_CC in pairs(HeadGrid(2, 2, 2)).items()
    }
    assert found["same_base"] == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert found["same_extension"] == {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert found["neither"] == {(0, 3), (1, 2), (4, 7), (5, 6)}
    assert found["within"] == found["same_base"] | found["same_extension"] | found["neither"]
    assert found["between"] == set(itertools.product(range(4), range(4, 8)))


def test_cosines_by_hand() -> None:
    """Two heads of 1 x 2 cells: rows at 0, 90 and 60 degrees, and one that is 0."""
    rows_CD = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 3.0**0.5], [0.0, 0.0]])
    found_CC = cosines(rows_CD)
    expected = torch.tensor([[1, 0, 0.5], [0, 1, 0.75**0.5], [0.5, 0.75**0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(found_CC[:3, :3], expected, rtol=0, atol=1e-7)
    assert found_CC[3].isnan().all()
    kinds = ByKind.of(found_CC, HeadGrid(2, 1, 2))
    assert (kinds.within.number, kinds.same_base.number, kinds.same_extension.number) == (1, 1, 0)
    assert (kinds.within.mean, kinds.between.number) == (0, 2)
    assert kinds.between.mean == pytest.approx((0.5 + 0.75**0.5) / 2, rel=1e-5)


# --- spread, Pearson, effective number --------------------------------------------------------------------------


def test_spread_by_hand() -> None:
    found = Spread.of(torch.arange(101) - 50.0)
    assert (found.number, found.mean, found.quantiles) == (101, 0, (-45, -25, 0, 25, 45))
    assert found.mean_abs == pytest.approx(2 * sum(range(51)) / 101, rel=1e-5)
    assert Spread.of(torch.zeros(0)) == Spread(number=0, mean=None, mean_abs=None, quantiles=None)


def test_pearson_by_hand() -> None:
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6])) == 1
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 0, 1])) == 0
    assert pearson(torch.tensor([1.0, 2, math.nan, 4]), torch.tensor([3.0, 1, 0, math.nan])) == -1
    assert pearson(torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 2, 3])) is None
    assert pearson(torch.tensor([1.0]), torch.tensor([1.0])) is None


def test_effective_number_by_hand() -> None:
    mass = torch.tensor([[5.0, 0, 0], [1, 1, 1], [2, 1, 1], [0, 0, 0]])
    found = effective_number(mass)
    assert found[:3].tolist() == pytest.approx([1, 3, 2**1.5])
    assert found[3].isnan()


# --- structure --------------------------------------------------------------------------------------------------


def statistics(active: list[int], mean: list[float], tokens: int = 100) -> LatentStatistics:
    return LatentStatistics(
        tokens=tokens,
        active_tokens=tuple(active),
        min_activation=tuple(mean),
        max_activation=tuple(mean),
        mean_activation=tuple(mean),
    )


def test_living_cells_and_meanings_by_hand() -> None:
    """Two heads of 1 base and 3 extensions, and one that is dead."""
    grid = HeadGrid(3, 1, 3)
    found = statistics([10, 10, 0, 5, 0, 0, 0, 0, 0], [1.0, 1.0, 0, 7.0, 0, 0, 0, 0, 0])
    living = living_cells(found, grid)
    assert living.heads_by_living == (1, 1, 1, 0)
    assert living.share_by_cell == ((0.6667, 0.3333, 0.0),)
    mass_HMN = activation_mass(found, grid)
    assert mass_HMN.flatten().tolist() == [10, 10, 0, 35, 0, 0, 0, 0, 0]
    bases = meanings(mass_HMN.flatten(0, 1))
    assert bases.possible == 3
    assert list(bases.each) == [2, 1, None]
    assert (bases.effective_number.number, bases.effective_number.mean) == (2, 1.5)
    assert bases.largest_share.mean == 0.75
    (shown,) = shown_grids(found, grid, [0])
    assert shown.frequency == ((0.1, 0.1, 0.0),)
    assert shown.share_of_base == ((0.5, 0.5, 0.0),)


def profile(active: list[int], values: list[float]) -> Profile:
    return Profile(
        activity=statistics(active, values),
        token_entropy=tuple(values),
        entropy_tokens=100,
        entropy_units=len(values),
        multitoken_ratio=(None,) * len(values),
    )


def test_inheritance_by_hand() -> None:
    """Two heads of 1 base and 2 extensions; each latent's figures are the product of its parents'."""
    bases, extensions = profile([50, 50], [2.0, 3.0]), profile([50, 50, 50, 50], [1.0, 4.0, 5.0, 2.0])
    latents = profile([20, 20, 20, 9], [2.0, 8.0, 15.0, 1000.0])  # the last one is too rare to have a say
    found = inheritance(latents, bases, extensions, HeadGrid(2, 1, 2), least_active=10)
    assert found.latents == 3
    r = found.r["token_entropy"]
    assert r["product"] == 1
    x, y = np.array([2.0, 8, 15]), np.array([[2.0, 2, 3], [1, 4, 5], [1.5, 3, 4], [2**0.5, 8**0.5, 15**0.5]])
    for against, row in zip(("base", "extension", "mean", "mand"), y, strict=True):
        assert r[against] == pytest.approx(np.corrcoef(x, row)[0, 1], rel=1e-5)
    assert found.r["mean_activation"] == r
    assert found.r["frequency"]["base"] is None  # all alike
    assert found.r["multitoken_ratio"]["mand"] is None  # unknown


# --- fidelity ---------------------------------------------------------------------------------------------------


def head(gate: str = "mand", d_extension: int = 1) -> HeadSample:
    shape = KroneckerEncoderConfig(num_heads=1, d_base=1, d_extension=d_extension, gate=gate)  # type: ignore[arg-type]
    sae = SAEConfig(d_in=2, encoder=shape, sparsifier=TopKConfig(k=1)).build()
    return HeadSample(kron_encoder(sae), [0])


def values_of(u: list[float], v: list[float], kept: list[float]) -> HeadValues:
    tensors = [torch.tensor(one).unsqueeze(1) for one in (u, v, kept)]
    return HeadValues(tensors[0].unsqueeze(1), tensors[1].unsqueeze(1), tensors[2], tensors[2])


def test_fidelity_by_hand() -> None:
    """Ten tokens; the positive u's have mean 10, the positive v's mean 2."""
    u = [10.0, 10, 19, 1, -5, -5, -5, -5, -5, -5]
    v = [2.0, 2, 2, 2, 2, 2, 2, 2, 2, -1]
    kept = [4.0, 0, 6, 1, 0, 0, 0, 0, 0, 0]
    sample = head()
    scale = ParentScale(sample, 10)
    scale.update(values_of(u, v, kept))
    assert scale.mean().tolist() == [[10, 2]]
    assert scale.at_top(0.2).tolist() == [[[10, 2]]]  # of ten, at most two are above
    assert scale.at_top(0.5)[0, 0, 0] == 0
    assert torch.equal(scale.at_top(0.5, 0.2), torch.cat([scale.at_top(0.5), scale.at_top(0.2)]))
    meter = FidelityMeter(sample, scale)
    for place in range(0, 10, 3):  # in batches
        meter.update(values_of(u[place : place + 3], v[place : place + 3], kept[place : place + 3]))
    found = meter.value()
    assert found.activations == 3
    mass, share = dict(found.false_positive_mass), dict(found.false_positive_share)
    assert mass[0.0] == mass[0.05] == 0
    assert mass[0.1] == pytest.approx(1 / 11, rel=1e-5)  # u = 1 is a tenth of 10
    assert mass[0.75] == mass[0.1]
    assert mass[1.0] == 1  # every v is at most its mean
    assert share[0.1] == pytest.approx(1 / 3, rel=1e-5)
    assert dict(found.both_top)[0.5] == 0  # v never exceeds its own median, 2
    assert found.balance_mean == pytest.approx(1, rel=1e-6)
    assert found.balance_deviation == pytest.approx(0, abs=1e-6)
    assert [at for at, _ in found.at_product] == list(RATIOS)
    assert [y for _, y in found.at_product] == pytest.approx([1.0] * len(RATIOS), rel=1e-6)
    low, *_, high = found.log2_imbalance or ()
    assert low == pytest.approx(math.log2(0.5), abs=1 / 8)
    assert high == pytest.approx(math.log2(9.5), abs=1 / 8)


def test_both_among_their_top() -> None:
    """u and v are the same ramp: kept where both are large, or where only one is."""
    ramp = [float(n) for n in range(100)]
    sample = head()
    scale = ParentScale(sample, 100)
    scale.update(values_of(ramp, ramp, ramp))
    aligned, crossed = FidelityMeter(sample, scale), FidelityMeter(sample, scale)
    aligned.update(values_of([99.0, 95.0], [99.0, 95.0], [1.0, 1.0]))
    crossed.update(values_of([99.0, 95.0], [50.5, 95.0], [1.0, 1.0]))
    assert dict(aligned.value().both_top) == {0.01: 0.5, 0.02: 0.5, 0.05: 1, 0.1: 1, 0.2: 1, 0.5: 1}
    assert dict(crossed.value().both_top) == {0.01: 0, 0.02: 0, 0.05: 0.5, 0.1: 0.5, 0.2: 0.5, 0.5: 1}
    assert [at for at, _ in aligned.value().both_top] == list(TOP_SHARES)


def test_gates_differ_at_a_fixed_product() -> None:
    u, v, kept = [8.0, 2.0], [2.0, 8.0], [1.0, 1.0]
    found = {}
    for gate in ("mand", "minimum", "relu_product", "mand_eps"):
        sample = head(gate)
        scale = ParentScale(sample, 2)
        scale.update(values_of(u, v, kept))
        meter = FidelityMeter(sample, scale)
        meter.update(values_of(u, v, kept))
        found[gate] = meter.value()
    assert dict(found["minimum"].at_product)[16] == pytest.approx(1 / 4, rel=1e-5)
    assert found["minimum"].balance_mean == pytest.approx(0.5, rel=1e-5)
    for gate in ("mand", "relu_product", "mand_eps"):
        assert dict(found[gate].at_product)[16] == pytest.approx(1, rel=1e-5)


def test_a_gate_that_breaks_the_and_is_found_out() -> None:
    """mand_eps keeps 0.00316 where a parent is negative."""
    sample = head("mand_eps")
    values = values_of([-1.0, 3.0], [4.0, 3.0], [0.00316, 3.0])
    scale = ParentScale(sample, 2)
    scale.update(values)
    meter = FidelityMeter(sample, scale)
    meter.update(values)
    found = meter.value()
    assert dict(found.false_positive_share)[0.0] == 0.5
    assert dict(found.false_positive_mass)[0.0] == pytest.approx(0.00316 / 3.00316, rel=1e-4)
    assert [at for at, _ in found.false_positive_mass] == list(THRESHOLDS)


def test_nothing_kept_is_no_error() -> None:
    sample = head()
    scale = ParentScale(sample, 2)
    values = values_of([1.0, 1.0], [1.0, 1.0], [0.0, 0.0])
    scale.update(values)
    meter = FidelityMeter(sample, scale)
    meter.update(values)
    found = meter.value()
    assert found.activations == 0
    assert found.log2_imbalance is None
    assert found.balance_mean is None
    assert found.at_product == ()


def test_the_tokens_of_the_quantiles_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronsae.eval.interaction.fidelity.SAMPLED_TOKENS", 30)
    sae, x_BD = toys.kron_sae(5), torch.randn(100, 5)
    sample = HeadSample(kron_encoder(sae), [0, 3])
    found: list[Tensor] = []
    for size in (1, 7, 100):
        scale = ParentScale(sample, 100)
        for part_BD in x_BD.split(size):
            scale.update(sample.of(part_BD, sae.encode(part_BD)))
        found.append(scale.at_top(0.1)[0])
    u_BHM, _ = kron_encoder(sae).pre_latents(x_BD[::4])  # every fourth of 100 tokens: 25, at most 30
    assert float(found[0][0, 0]) == pytest.approx(float(u_BHM.detach()[:, 0, 0].relu().sort(descending=True).values[2]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_narrowed_codes_give_the_sampled_latents_statistics() -> None:
    sae, x_BD = toys.kron_sae(5), torch.randn(50, 5)
    sample, codes = HeadSample(kron_encoder(sae), [2, 5]), sae.encode(x_BD)
    everything, some = LatentMeter(sae.d_sae), LatentMeter(12)
    everything.update(codes)
    narrowed = sample.narrow(codes)
    assert isinstance(narrowed, SparseCodes)
    some.update(narrowed)
    expected = everything.value()
    assert some.value().active_tokens == tuple(expected.active_tokens[latent] for latent in sample.latents_C.tolist())
    assert some.value().tokens == 50
