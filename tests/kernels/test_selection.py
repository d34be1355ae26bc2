"""Selections equal the reference's, as sets, over sizes, ties, signs and thousands of random cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.helpers import operation, same_values
from torch import Tensor

from kronsae.kernels import Choice, KroneckerSelection, parents, portable, reference
from kronsae.kernels.dispatch import choose, refuse

cpu = pytest.importorskip("kronsae.kernels.cpu")

# B, H, M, N, K: odd sizes, k above H, k = F, one head, one cell
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 2, 3, 7), (17, 13, 4, 8, 32), (2, 3, 1, 7, 21), (9, 40, 3, 5, 1), (4, 2, 9, 4, 40)]


def products(pre_BHP: Tensor, d_base: int, selection: KroneckerSelection) -> Tensor:
    """The selected products in float64, largest first."""
    u, v = (pre_BHP.double().flatten(1).gather(1, rows).relu() for rows in selection[1:])
    return (u * v).sort(dim=1, descending=True).values


def check(pre_BHP: Tensor, d_base: int, got: KroneckerSelection, want: KroneckerSelection) -> None:
    """The same products (bitwise), consistent parents, no latent twice."""
    d_extension = pre_BHP.shape[-1] - d_base
    assert all(torch.equal(a, b) for a, b in zip(got, parents(got.indices_BK, d_base, d_extension), strict=True))
    assert got.indices_BK.dtype == torch.int64
    ordered = got.indices_BK.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all()
    torch.testing.assert_close(products(pre_BHP, d_base, got), products(pre_BHP, d_base, want), rtol=2**-22, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, -0.8, -9.0, 9.0])  # some, few, none, all of the products positive
def test_topk(path: str, shape: tuple[int, ...], dtype: torch.dtype, shift: float) -> None:
    tokens, heads, d_base, d_extension, k = shape
    pre_BHP = torch.randn(tokens, heads, d_base + d_extension, dtype=dtype) + shift
    got = operation(path, "kronecker_topk")(pre_BHP, d_base, k)
    check(pre_BHP, d_base, got, reference.kronecker_topk(pre_BHP, d_base, k))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, -9.0])
def test_topk_among(path: str, shape: tuple[int, ...], shift: float) -> None:
    tokens, heads, d_base, d_extension, k = shape
    pre_BHP = torch.randn(tokens, heads, d_base + d_extension) + shift
    among_C = torch.randperm(heads * d_base * d_extension)[: max(k, heads * d_base * d_extension // 2)]
    got = operation(path, "kronecker_topk_among")(pre_BHP, d_base, k, among_C)
    assert torch.isin(got.indices_BK, among_C).all()
    check(pre_BHP, d_base, got, reference.kronecker_topk_among(pre_BHP, d_base, k, among_C))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_batch_topk(path: str, shape: tuple[int, ...], share: float) -> None:
    tokens, heads, d_base, d_extension, _ = shape
    pre_BHP = torch.randn(tokens, heads, d_base + d_extension)
    total = max(1, int(share * tokens * heads * d_base * d_extension))
    got = operation(path, "kronecker_batch_topk")(pre_BHP, d_base, total)
    want = reference.kronecker_batch_topk(pre_BHP, d_base, total)
    assert torch.equal(got.chosen_BK, want.chosen_BK)
    assert torch.equal(got.selection.indices_BK, want.selection.indices_BK)
    positive = int((reference.kronecker_products(pre_BHP, d_base) > 0).sum())
    assert int(got.chosen_BK.sum()) == min(total, positive)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_and_selections_in_one(path: str, tokens: int, dtype: torch.dtype) -> None:
    x_BD, weight_HPD = torch.randn(tokens, 19, dtype=dtype), torch.randn(11, 7, 19, dtype=dtype)
    bias_HP = torch.randn(11, 7, dtype=dtype)
    among_C = torch.randperm(11 * 12)[:50]
    choices = [Choice(9), Choice(20, among_C)]
    got = operation(path, "kronecker_linear_topk")(x_BD, weight_HPD, bias_HP, 3, choices)
    want = reference.kronecker_linear_topk(x_BD, weight_HPD, bias_HP, 3, choices)
    for (selection, rows_BR, pre_BR), expected, k in zip(got, want, (9, 20), strict=True):
        assert torch.equal(rows_BR, torch.cat(selection[1:], dim=1))
        all_BP = (x_BD @ weight_HPD.flatten(0, 1).T) + bias_HP.flatten()
        same_values(pre_BR, all_BP.gather(1, rows_BR))
        for pre in (pre_BR, expected.pre_BR):
            assert pre.shape == (tokens, 2 * k)
        found, wanted = ((pre[:, :k].relu() * pre[:, k:].relu()).sort().values for pre in (pre_BR, expected.pre_BR))
        same_values(found, wanted)


@pytest.mark.parametrize("rows", [1, 3])
def test_selections_in_several_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one token, and of three, which do not divide the 17 and 70 tokens."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", rows * 13 * 12 * 4)
    test_topk("cpu", SHAPES[2], torch.float32, 0.0)
    test_topk_among("cpu", SHAPES[2], 0.0)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", rows * 11 * 7 * 4)
    test_product_and_selections_in_one("cpu", 70, torch.float32)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1)  # less than a token
    test_topk("cpu", SHAPES[2], torch.float64, 0.0)


@pytest.mark.parametrize("width", [1, 7, 1023, 1025, 5000])
def test_dense_topk(path: str, width: int) -> None:
    x_BD, weight_PD, bias_P = torch.randn(13, 6), torch.randn(width, 6), torch.randn(width)
    k = min(width, 11)
    values_BK, rows_BK = operation(path, "linear_topk")(x_BD, weight_PD, bias_P, k)
    want_BK, _ = reference.linear_topk(x_BD, weight_PD, bias_P, k)
    assert (rows_BK.sort(dim=1).values.diff(dim=1) > 0).all()
    same_values(values_BK, (x_BD @ weight_PD.T + bias_P).gather(1, rows_BK))
    same_values(values_BK.relu().sort(dim=1).values, want_BK.relu().sort(dim=1).values)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Pre-latents of few distinct values, so that ties are everywhere, with a shape and a k."""
    tokens, heads, d_base, d_extension = (draw(st.integers(1, top)) for top in (4, 9, 5, 5))
    k = draw(st.integers(1, heads * d_base * d_extension))
    levels = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (tokens, heads, d_base + d_extension)
    low = draw(st.integers(-levels, 1))
    return torch.randint(low, levels + 1, size, generator=generator).float(), d_base, k


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_ties_go_to_the_smaller_latent(case: tuple[Tensor, int, int]) -> None:
    pre_BHP, d_base, k = case
    got, want = cpu.kronecker_topk(pre_BHP, d_base, k), reference.kronecker_topk(pre_BHP, d_base, k)
    assert torch.equal(got.indices_BK.sort().values, want.indices_BK.sort().values)
    check(pre_BHP, d_base, portable.kronecker_topk(pre_BHP, d_base, k), want)
    total = k * len(pre_BHP)
    for candidate in (cpu, portable):
        batch = candidate.kronecker_batch_topk(pre_BHP, d_base, total)
        expected = reference.kronecker_batch_topk(pre_BHP, d_base, total)
        assert int(batch.chosen_BK.sum()) == int(expected.chosen_BK.sum())
        u, v = (pre_BHP.flatten(1).gather(1, rows).relu() for rows in batch.selection[1:])
        p, q = (pre_BHP.flatten(1).gather(1, rows).relu() for rows in expected.selection[1:])
        assert torch.equal((u * v)[batch.chosen_BK].sort().values, (p * q)[expected.chosen_BK].sort().values)
    batch = cpu.kronecker_batch_topk(pre_BHP, d_base, total)
    expected = reference.kronecker_batch_topk(pre_BHP, d_base, total)
    assert torch.equal(batch.selection.indices_BK, expected.selection.indices_BK)


def test_thousands_of_random_cases() -> None:
    generator = torch.Generator().manual_seed(5)
    tokens_tried = 0
    for _ in range(150):
        tokens, heads, d_base, d_extension = (
            int(torch.randint(1, top, (), generator=generator)) for top in (60, 80, 7, 9)
        )
        k = int(torch.randint(1, heads * d_base * d_extension + 1, (), generator=generator))
        scale = 10.0 ** float(torch.randint(-4, 5, (), generator=generator))
        pre_BHP = scale * torch.randn(tokens, heads, d_base + d_extension, generator=generator)
        got = cpu.kronecker_topk(pre_BHP, d_base, min(k, 64))
        want = reference.kronecker_topk(pre_BHP, d_base, min(k, 64))
        assert torch.equal(got.indices_BK.sort().values, want.indices_BK.sort().values)
        tokens_tried += tokens
    assert tokens_tried > 3000


def test_a_pre_latent_that_is_not_a_number_is_never_selected() -> None:
    pre_BHP = torch.rand(3, 4, 5) + 0.1
    pre_BHP[1, 2, 1] = torch.nan
    chosen = cpu.kronecker_topk(pre_BHP, 2, 10)
    assert not pre_BHP.flatten(1).gather(1, chosen.base_rows_BK).isnan().any()


def test_infinite_pre_latents_come_first() -> None:
    pre_BHP = torch.rand(3, 4, 5) + 0.1
    pre_BHP[1, 2, 1] = torch.inf
    chosen = cpu.kronecker_topk(pre_BHP, 2, 3)
    assert (chosen.base_rows_BK[1] == 2 * 5 + 1).all()


def not_finite(rows: Tensor) -> Tensor:
    """Rows 1 to 6 with one NaN, NaN only, one infinity, +inf only, -inf only, one of each; the rest stays."""
    rows[1, 2] = torch.nan
    rows[2] = torch.nan
    rows[3, 2] = torch.inf
    rows[4] = torch.inf
    rows[5] = -torch.inf
    rows[6, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return rows


def check_rows_exist(rows: Tensor, height: int) -> None:
    assert (rows >= 0).all()
    assert (rows < height).all()


@pytest.mark.parametrize("width", [3, 16, 1500])
@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_dense_topk_of_rows_not_finite(path: str, width: int, k: int, where: str) -> None:
    k = min(k, width)
    x_BD, weight_PD, bias_P = torch.randn(8, 6), torch.randn(width, 6), torch.randn(width)
    if where == "x":
        x_BD = not_finite(x_BD)
    elif where == "weight":  # one output of every token is NaN, another is infinite
        weight_PD[0], weight_PD[1, 0] = torch.nan, torch.inf
    else:
        bias_P[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    values_BK, rows_BK = operation(path, "linear_topk")(x_BD, weight_PD, bias_P, k)
    check_rows_exist(rows_BK, width)
    assert (rows_BK.sort(dim=1).values.diff(dim=1) > 0).all()
    own_BK = torch.addmm(bias_P, x_BD, weight_PD.T).gather(1, rows_BK)
    torch.testing.assert_close(values_BK, own_BK, rtol=1e-5, atol=1e-5, equal_nan=True)
    decoded_BD = operation(path, "weighted_rows")(values_BK.relu(), rows_BK, torch.randn(width, 6))
    assert decoded_BD[values_BK.isnan().any(dim=1)].isnan().all()  # a NaN is not hidden
    if where == "x":
        assert values_BK[1:3].isnan().all()
        assert not values_BK[[0, 7]].isnan().any()
        assert not decoded_BD[[0, 7]].isnan().any()


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("sign", [1, -1])
def test_kronecker_topk_of_rows_not_finite(path: str, k: int, sign: int) -> None:
    pre_BHP = not_finite(torch.randn(9, 50)).view(9, 10, 5)
    pre_BHP[7, :, 0], pre_BHP[7, :, 2:] = torch.inf, -1  # inf * 0 in every head
    pre_BHP[8, 3:] = torch.nan
    pre_BHP = sign * pre_BHP
    among_C = torch.arange(0, 60, 1 if k == 60 else 2)
    among = operation(path, "kronecker_topk_among")(pre_BHP, 2, k, among_C)
    assert torch.isin(among.indices_BK, among_C).all()
    batch, chosen_BK = operation(path, "kronecker_batch_topk")(pre_BHP, 2, 9 * k)
    assert chosen_BK.shape == batch.indices_BK.shape
    for got in (operation(path, "kronecker_topk")(pre_BHP, 2, k), among, batch):
        check_rows_exist(got.indices_BK, 60)
        assert all(torch.equal(a, b) for a, b in zip(got, parents(got.indices_BK, 2, 3), strict=True))
    for got in (operation(path, "kronecker_topk")(pre_BHP, 2, k), among):
        assert (got.indices_BK.sort(dim=1).values.diff(dim=1) > 0).all()


def test_a_pre_latent_not_finite_hides_no_other() -> None:
    """Ten finite heads and an eleventh of NaN or of infinity times zero: the selections are those of the ten."""
    finite_BHP = torch.rand(6, 10, 5) + 0.1
    odd_BHP = torch.full((6, 1, 5), torch.nan)
    odd_BHP[3:, :, :2], odd_BHP[3:, :, 2:] = torch.inf, -1
    pre_BHP = torch.cat([finite_BHP, odd_BHP], dim=1)
    got, want = cpu.kronecker_topk(pre_BHP, 2, 20), cpu.kronecker_topk(finite_BHP, 2, 20)
    assert torch.equal(got.indices_BK.sort().values, want.indices_BK.sort().values)
    for total in (1, 40):
        batch, expected = (cpu.kronecker_batch_topk(each, 2, total) for each in (pre_BHP, finite_BHP))
        assert torch.equal(batch.selection.indices_BK, expected.selection.indices_BK)
        assert int(batch.chosen_BK.sum()) == total


def test_the_suite_would_notice_a_wrong_selection() -> None:
    pre_BHP = torch.rand(3, 4, 5)
    want = reference.kronecker_topk(pre_BHP, 2, 3)
    wrong = reference.kronecker_topk(-pre_BHP + 1, 2, 3)
    with pytest.raises(AssertionError):
        check(pre_BHP, 2, wrong, want)


def test_no_dispatch_falls_back_in_silence() -> None:
    assert refuse("portable", "kronecker_topk", torch.device("cpu"), torch.bfloat16) is None
    assert choose("kronecker_topk", torch.zeros(1, dtype=torch.bfloat16)) is portable.kronecker_topk
