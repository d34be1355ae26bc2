"""Heads with null symbols: selections equal the reference's, over sizes, ties, signs, dtypes and random cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.helpers import operation, same_values
from torch import Tensor

from kronsae.kernels import Choice, ChosenPairs, cells_per_head, composed
from kronsae.kernels.selection import NULL_PRODUCTS

# B, H, M, N, K: odd sizes, k above H, k = F, one head, one of each
SHAPES = [(1, 1, 1, 1, 3), (3, 5, 2, 3, 7), (17, 13, 4, 8, 32), (2, 3, 1, 7, 45), (9, 40, 3, 5, 1), (4, 2, 9, 4, 40)]
SHAPES += [(33, 21, 2, 2, 16), (33, 30, 1, 1, 16)]


def all_keys(pre_BHP: Tensor, d_base: int) -> Tensor:
    """What ranks each latent, one head after another, from the formula: nothing of the library."""
    keys = []
    for pre_BP in pre_BHP.unbind(1):
        u_BM, v_BN = pre_BP[:, :d_base].relu(), pre_BP[:, d_base:].relu()
        for i in range(d_base):
            keys += [u_BM[:, i] * v_BN[:, j] for j in range(v_BN.shape[1])]
            keys.append((u_BM[:, i] - v_BN.amax(1)).relu() ** 2)
        keys += [(v_BN[:, j] - u_BM.amax(1)).relu() ** 2 for j in range(v_BN.shape[1])]
    return torch.stack(keys, dim=1)


def select(path: str, pre_BHP: Tensor, d_base: int, *choices: Choice) -> list[ChosenPairs]:
    """Select from given pre-latents: the input is one-hot, the weights are the pre-latents of its token."""
    tokens = len(pre_BHP)
    weight_HPD = pre_BHP.permute(1, 2, 0).contiguous()
    x_BD = torch.eye(tokens, dtype=pre_BHP.dtype)
    found: list[ChosenPairs] = operation(path, "kronecker_linear_topk")(
        x_BD, weight_HPD, torch.zeros_like(weight_HPD[..., 0]), d_base, choices, True
    )
    return found


def check(pre_BHP: Tensor, d_base: int, chosen: ChosenPairs, among_C: Tensor, k: int) -> None:
    """The k largest keys, bitwise; no latent twice; rows and values of parents that give these keys."""
    keys_BF = all_keys(pre_BHP, d_base)
    indices_BK = chosen.selection.indices_BK
    assert (indices_BK.dtype, indices_BK.shape) == (torch.int64, (len(pre_BHP), k))
    assert torch.isin(indices_BK, among_C).all()
    assert (indices_BK.sort(dim=1).values.diff(dim=1) > 0).all()
    got_BK = keys_BF.gather(1, indices_BK)
    want_BK = keys_BF[:, among_C].topk(k, dim=1).values
    assert torch.equal(got_BK.sort(dim=1, descending=True).values, want_BK)
    width = pre_BHP.shape[-1]
    rows_BR = torch.cat(chosen.selection[1:], dim=1)
    assert torch.equal(rows_BR, chosen.rows_BR)
    assert torch.equal(chosen.pre_BR, pre_BHP.flatten(1).gather(1, rows_BR))
    cells = cells_per_head(d_base, width - d_base, True)
    assert torch.equal(rows_BR // width, (indices_BK // cells).repeat(1, 2)), "parents are of the latent's head"
    assert (rows_BR[:, :k] % width < d_base).all()
    assert (rows_BR[:, k:] % width >= d_base).all()
    u_BK, v_BK = chosen.pre_BR.chunk(2, dim=1)
    assert torch.equal(composed(NULL_PRODUCTS, u_BK, v_BK, indices_BK, d_base, width - d_base), got_BK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, -0.8, -9.0, 9.0])  # some, few, none, all of the pre-latents positive
def test_topk_and_topk_among(path: str, shape: tuple[int, ...], dtype: torch.dtype, shift: float) -> None:
    if path == "cpu" and dtype == torch.bfloat16:
        pytest.skip("its loops support float32 and float64")
    tokens, heads, d_base, d_extension, k = shape
    pre_BHP = torch.randn(tokens, heads, d_base + d_extension, dtype=dtype) + shift
    latents = heads * cells_per_head(d_base, d_extension, True)
    among_C = torch.randperm(latents)[: max(k, latents // 2)]
    whole, part = select(path, pre_BHP, d_base, Choice(k), Choice(k, among_C))
    check(pre_BHP, d_base, whole, torch.arange(latents), k)
    check(pre_BHP, d_base, part, among_C, k)


@pytest.mark.parametrize("block_bytes", [1, 3 * 13 * 12 * 4])
def test_selections_in_several_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one token, and of three, which do not divide the 17 tokens."""
    cpu = pytest.importorskip("kronsae.kernels.cpu")
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    test_topk_and_topk_among("cpu", SHAPES[2], torch.float32, 0.0)


def test_thousands_of_random_cases(path: str) -> None:
    generator = torch.Generator().manual_seed(5)
    tried = 0
    for _ in range(20 if path == "gpu" else 80):
        tokens, heads, row = (int(torch.randint(1, top, (), generator=generator)) for top in (60, 80, len(SHAPES)))
        _, _, d_base, d_extension, _ = SHAPES[row]  # each shape is compiled once
        latents = heads * cells_per_head(d_base, d_extension, True)
        k = min(64, int(torch.randint(1, latents + 1, (), generator=generator)))
        scale = 10.0 ** float(torch.randint(-4, 5, (), generator=generator))
        pre_BHP = scale * torch.randn(tokens, heads, d_base + d_extension, generator=generator)
        (found,) = select(path, pre_BHP, d_base, Choice(k))
        check(pre_BHP, d_base, found, torch.arange(latents), k)
        tried += tokens
    assert tried > (300 if path == "gpu" else 2000)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Pre-latents of few distinct values, so that ties are everywhere, with a shape and a k."""
    tokens, heads = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    _, _, d_base, d_extension, _ = draw(st.sampled_from(SHAPES))
    k = draw(st.integers(1, heads * cells_per_head(d_base, d_extension, True)))
    levels = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = (tokens, heads, d_base + d_extension)
    return torch.randint(draw(st.integers(-levels, 1)), levels + 1, size, generator=generator).float(), d_base, k


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_ties_go_to_the_smaller_latent(case: tuple[Tensor, int, int]) -> None:
    pytest.importorskip("numba")
    pre_BHP, d_base, k = case
    latents = pre_BHP.shape[1] * cells_per_head(d_base, pre_BHP.shape[2] - d_base, True)
    among_C = torch.arange(0, latents, 2)
    few = min(k, len(among_C))
    for choice, listed_C in ((Choice(k), torch.arange(latents)), (Choice(few, among_C), among_C)):
        (want,) = select("reference", pre_BHP, d_base, choice)
        (got,) = select("cpu", pre_BHP, d_base, choice)
        (portable,) = select("portable", pre_BHP, d_base, choice)
        for found in (want, got, portable):
            check(pre_BHP, d_base, found, listed_C, choice.k)
        order, wanted_order = got.selection.indices_BK.sort().indices, want.selection.indices_BK.sort().indices
        for one, other in zip(got.selection, want.selection, strict=True):
            assert torch.equal(one.gather(1, order), other.gather(1, wanted_order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_and_selections_in_one(path: str, dtype: torch.dtype) -> None:
    x_BD, weight_HPD, bias_HP = (torch.randn(*size, dtype=dtype) for size in ((70, 19), (11, 5, 19), (11, 5)))
    choices = [Choice(9), Choice(20, torch.randperm(11 * 11)[:50])]
    arguments = x_BD, weight_HPD, bias_HP, 2, choices, True
    found, wanted = (operation(name, "kronecker_linear_topk")(*arguments) for name in (path, "reference"))
    for pair in zip(found, wanted, strict=True):
        got, want = (
            composed(NULL_PRODUCTS, pairs.pre_BR[:, :k], pairs.pre_BR[:, k:], pairs.selection.indices_BK, 2, 3).sort()
            for pairs in pair
            for k in (pairs.pre_BR.shape[1] // 2,)
        )
        same_values(got.values, want.values, factor=2)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 5, 110])
def test_pre_latents_not_finite(path: str, k: int, sign: int) -> None:
    pre_BHP = torch.randn(8, 10, 5)
    pre_BHP[1, 2, 1], pre_BHP[2], pre_BHP[3, 2, 1] = torch.nan, torch.nan, torch.inf
    pre_BHP[4], pre_BHP[5], pre_BHP[6, :, 0] = torch.inf, -torch.inf, torch.inf
    pre_BHP = sign * pre_BHP
    # one product would spread a token's infinity over the batch
    weight_HPD, bias_HP = torch.zeros(10, 5, 1), torch.zeros(10, 5)
    for token in pre_BHP:
        (found,) = operation(path, "kronecker_linear_topk")(
            torch.zeros(1, 1), weight_HPD, bias_HP + token, 2, [Choice(k)], True
        )
        indices_BK, *rows = found.selection
        assert ((indices_BK >= 0) & (indices_BK < 110)).all()
        assert (indices_BK.sort(dim=1).values.diff(dim=1) > 0).all()
        assert all(((each >= 0) & (each < 50)).all() for each in rows)
        assert torch.equal(found.pre_BR.isnan(), token.view(1, -1).gather(1, found.rows_BR).isnan())


def test_an_infinite_parent_comes_first_alone() -> None:
    pytest.importorskip("numba")
    pre_BHP = torch.rand(3, 4, 5) + 0.1
    bias_HP = pre_BHP[1].clone()
    bias_HP[2, 1] = torch.inf
    (found,) = operation("cpu", "kronecker_linear_topk")(
        torch.zeros(1, 1), torch.zeros(4, 5, 1), bias_HP, 2, [Choice(4)], True
    )
    assert sorted(found.selection.indices_BK[0].tolist()) == [2 * 11 + 4 + j for j in range(4)]


def test_the_suite_would_notice_a_wrong_selection() -> None:
    pre_BHP = torch.rand(3, 4, 5)
    (right,) = select("reference", pre_BHP, 2, Choice(3))
    (other,) = select("reference", pre_BHP.flip(0), 2, Choice(3))
    check(pre_BHP, 2, right, torch.arange(44), 3)
    for wrong in (right._replace(selection=other.selection), right._replace(rows_BR=other.rows_BR)):
        with pytest.raises(AssertionError):
            check(pre_BHP, 2, wrong, torch.arange(44), 3)
