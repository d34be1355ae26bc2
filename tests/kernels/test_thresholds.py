"""Test thresholding and the best of a batch: every path against its definition, whole and in chunks.

Inputs are small multiples of 1/4, whose products and sums are exact in any order: rows and values are compared bit for
bit, and ties are everywhere.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from tests.kernels.helpers import operation, same_values
from torch import Tensor

from kronsae import kernels
from kronsae.core.gates import GATES
from kronsae.kernels import Above, BatchChoice, Choice, Composition, Request, parents, reference
from kronsae.kernels.requests import kronecker_linear_select

DTYPES = [torch.float32, torch.float64]
WIDTHS = [1, 31, 32, 33, 1023, 1025, 2500]
Layer = tuple[Tensor, Tensor, Tensor]


def grid(*size: int, generator: torch.Generator | None = None, top: int = 6) -> Tensor:
    """Multiples of 1/4 between ``-top / 4`` and ``top / 4``."""
    return torch.randint(-top, top + 1, size, generator=generator) / 4


def layer(tokens: int, width: int, dtype: torch.dtype = torch.float32, d_in: int = 6) -> Layer:
    return grid(tokens, d_in).to(dtype), grid(width, d_in).to(dtype), grid(width).to(dtype)


def same_choice(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Values and rows bit for bit."""
    for mine, other in zip(got, want, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["some", "all", "none", "few", "own"])
def test_linear_above(path: str, dtype: torch.dtype, which: str) -> None:
    for width in WIDTHS:
        check_linear_above(path, width, dtype, which)


def check_linear_above(path: str, width: int, dtype: torch.dtype, which: str) -> None:
    x_BD, weight_PD, bias_P = layer(13, width, dtype)
    if which == "all":
        bias_P = bias_P + 50
    levels = {"some": 0.0, "all": -3.0, "none": 100.0, "few": 6.0}
    thresholds_P = torch.full((width,), levels[which]) if which in levels else grid(width, top=12)
    thresholds_P = thresholds_P.to(dtype)
    got = operation(path, "linear_above")(x_BD, weight_PD, bias_P, thresholds_P)
    same_choice(got, reference.linear_above(x_BD, weight_PD, bias_P, thresholds_P))
    pre_BP = x_BD @ weight_PD.T + bias_P
    wanted_BP = torch.where((pre_BP > thresholds_P) & (pre_BP > 0), pre_BP, 0.0)
    assert torch.equal(torch.zeros_like(pre_BP).scatter_add(1, got[1], got[0]), wanted_BP)
    assert got[0].shape[1] == max(1, int((wanted_BP > 0).sum(1).max()))
    if which == "all":
        assert got[0].shape[1] == width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_linear_batch_topk(path: str, dtype: torch.dtype, share: float) -> None:
    for width in WIDTHS:
        check_linear_batch_topk(path, width, dtype, share)


def check_linear_batch_topk(path: str, width: int, dtype: torch.dtype, share: float) -> None:
    x_BD, weight_PD, bias_P = layer(13, width, dtype)
    total = max(1, int(share * 13 * width))
    got = operation(path, "linear_batch_topk")(x_BD, weight_PD, bias_P, total)
    want = reference.linear_batch_topk(x_BD, weight_PD, bias_P, total)
    pre_BP = x_BD @ weight_PD.T + bias_P
    assert int((got[0] > 0).sum()) == min(total, int((pre_BP > 0).sum()))
    assert torch.equal(got[0][got[0] > 0].sort().values, want[0][want[0] > 0].sort().values)
    assert torch.equal(torch.where(got[0] > 0, pre_BP.gather(1, got[1]), 0.0), got[0])
    if path in ("cpu", "reference"):  # of equal ones the earlier token, then row
        same_choice(got, want)


def test_many_random_cases() -> None:
    cpu = pytest.importorskip("kronsae.kernels.cpu")
    generator = torch.Generator().manual_seed(3)
    tokens_tried = 0
    for _ in range(250):
        tokens, width, d_in, top = (int(torch.randint(1, most, (), generator=generator)) for most in (40, 200, 5, 9))
        x_BD, weight_PD, bias_P = (
            grid(*size, generator=generator, top=top) for size in ((tokens, d_in), (width, d_in), (width,))
        )
        total = int(torch.randint(1, tokens * width + 1, (), generator=generator))
        want = reference.linear_batch_topk(x_BD, weight_PD, bias_P, total)
        same_choice(cpu.linear_batch_topk(x_BD, weight_PD, bias_P, total), want)
        thresholds_P = grid(width, generator=generator, top=3 * top)
        for path in ("cpu", "portable"):
            got = operation(path, "linear_above")(x_BD, weight_PD, bias_P, thresholds_P)
            same_choice(got, reference.linear_above(x_BD, weight_PD, bias_P, thresholds_P))
        tokens_tried += tokens
    assert tokens_tried > 3000


def test_nothing_that_is_not_a_number_is_chosen(path: str) -> None:
    x_BD, weight_PD, bias_P = layer(9, 70)
    x_BD[2], x_BD[4, 0] = torch.nan, torch.nan
    clean = torch.arange(9)[~x_BD.isnan().any(1)]
    for name, request in (("linear_above", torch.full((70,), 0.5)), ("linear_batch_topk", 9 * 70)):
        values_BK, rows_BK = operation(path, name)(x_BD, weight_PD, bias_P, request)
        assert not values_BK.isnan().any()
        assert values_BK[[2, 4]].eq(0).all()
        want = operation("reference", name)(x_BD[clean], weight_PD, bias_P, request)
        same_choice((values_BK[clean], rows_BK[clean]), want)
    bias_P[7], bias_P[8] = torch.inf, torch.nan
    values_BK, rows_BK = operation(path, "linear_batch_topk")(x_BD[clean], weight_PD, bias_P, len(clean))
    assert values_BK.isposinf().all()
    assert (rows_BK == 7).all()


def test_no_tokens_and_a_token_that_is_not_contiguous(path: str) -> None:
    x_BD, weight_PD, bias_P = layer(8, 40)
    thresholds_P = torch.zeros(40)
    none = operation(path, "kronecker_above")(torch.zeros(0, 4, 5), 2, torch.zeros(24), composition("mand"))
    assert [len(part) for part in none] == [0, 0]
    for name, request in (("linear_above", thresholds_P), ("linear_batch_topk", 20)):
        values_BK, rows_BK = operation(path, name)(x_BD[:0], weight_PD, bias_P, request)
        assert values_BK.shape == rows_BK.shape == (0, 1)
        strided = torch.stack([x_BD, -x_BD], dim=-1)[..., 0]
        same_choice(
            operation(path, name)(strided, weight_PD, bias_P, request),
            operation(path, name)(x_BD, weight_PD, bias_P, request),
        )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make products of 64 tokens, and compositions of few heads, from here on."""

    def cut() -> None:
        for module in ("portable", "cpu"):
            monkeypatch.setattr(f"kronsae.kernels.{module}.PRODUCT_ELEMENTS", 8)
        for module in ("portable", "requests"):
            monkeypatch.setattr(f"kronsae.kernels.{module}.CHUNK_ELEMENTS", 200)

    return cut


def test_chunks_change_nothing(path: str, small_chunks: Callable[[], None]) -> None:
    x_BD, weight_PD, bias_P = (part.double() for part in layer(150, 90))
    if path in ("portable", "gpu"):  # which of equal ones is chosen is left open there: let there be none
        x_BD = torch.randn_like(x_BD)
    requests = (("linear_above", grid(90).double()), ("linear_batch_topk", 300), ("linear_batch_topk", 9000))
    whole = [operation(path, name)(x_BD, weight_PD, bias_P, request) for name, request in requests]
    small_chunks()
    for (name, request), want in zip(requests, whole, strict=True):
        got = operation(path, name)(x_BD, weight_PD, bias_P, request)
        same_values(got[0], want[0])
        assert torch.equal(got[1], want[1])
    firsts, parts = zip(*operation(path, "product_chunks")(x_BD, weight_PD, bias_P), strict=True)
    assert path == "reference" or list(firsts) == [0, 50, 100] or list(firsts) == [0, 64, 128]
    assert sum(map(len, parts)) == 150


def test_the_best_of_a_batch_needs_no_more_than_a_chunk(small_chunks: Callable[[], None]) -> None:
    cpu = pytest.importorskip("kronsae.kernels.cpu")
    x_BD, weight_PD, bias_P = torch.randn(2048, 4), torch.randn(2000, 4), torch.zeros(2000)
    small_chunks()
    for call in (
        lambda: cpu.linear_batch_topk(x_BD, weight_PD, bias_P, 2048 * 4),
        lambda: cpu.linear_above(x_BD, weight_PD, bias_P, torch.full((2000,), 7.0)),
    ):
        call()
        tracemalloc.start()  # NumPy tells it what it allocates
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2048 * 2000 * 4 / 8


@pytest.mark.parametrize("collected", [False, True])
@pytest.mark.parametrize("request_", [Above(torch.full((50,), 0.7).double()), BatchChoice(90)], ids=["above", "batch"])
def test_gradients_by_name(path: str, request_: Request, collected: bool) -> None:
    leaves = {
        "x": torch.randn(20, 6, dtype=torch.float64, requires_grad=True),
        "weight": torch.randn(50, 6, dtype=torch.float64, requires_grad=True),
        "bias": torch.randn(50, dtype=torch.float64, requires_grad=True),
        "decoder": torch.randn(50, 6, dtype=torch.float64, requires_grad=True),
    }
    x_BD, weight_PD, bias_P, W_dec = leaves.values()
    with kernels.use(path), kernels.collect_row_gradients() as rows:
        if isinstance(request_, Above):
            values_BK, rows_BK = kernels.linear_above(x_BD, weight_PD, bias_P, request_.thresholds_F)
        else:
            assert isinstance(request_, BatchChoice)
            values_BK, rows_BK = kernels.linear_batch_topk(x_BD, weight_PD, bias_P, request_.total)
        values_BK = kernels.linear_at(x_BD, weight_PD, bias_P, rows_BK, values_BK).relu()
        kernels.decode(values_BK, rows_BK, W_dec, W_dec.new_zeros(6)).sin().sum().backward()
        if collected:
            assert weight_PD.grad is None
        rows.materialize()
    got = {name: leaf.grad for name, leaf in leaves.items()}
    pre_BP = x_BD @ weight_PD.T + bias_P
    kept_BP = torch.zeros_like(pre_BP).scatter_add(1, rows_BK, (values_BK > 0).double())
    want = torch.autograd.grad(((pre_BP * kept_BP) @ W_dec).sin().sum(), list(leaves.values()))
    for (name, mine), other in zip(got.items(), want, strict=True):
        assert mine is not None, name
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12, msg=name)


SHAPES = [(1, 1, 1, 1), (3, 5, 2, 3), (17, 13, 4, 8), (9, 40, 3, 5), (70, 6, 1, 7)]  # B, H, M, N


def composition(gate: str) -> Composition:
    learned = (torch.tensor([-0.5], dtype=torch.float64),) if GATES[gate].start is not None else ()
    return Composition(GATES[gate].order, lambda u, v: GATES[gate](u, v, *learned), GATES[gate].least_product)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("level", [0.0, 0.5, 0.00315, 30.0, -1.0])
def test_kronecker_above(path: str, gate: str, level: float) -> None:
    for (tokens, heads, d_base, d_extension), dtype in itertools.product(SHAPES, DTYPES):
        pre_BHP = grid(tokens, heads, d_base + d_extension).to(dtype)
        thresholds_F = torch.full((heads * d_base * d_extension,), level, dtype=dtype)
        if level == 0.5:  # own ones, many of which a value equals; some are below 0
            thresholds_F = grid(len(thresholds_F)).to(dtype)
        arguments = (pre_BHP, d_base, thresholds_F, composition(gate))
        got, want = operation(path, "kronecker_above")(*arguments), reference.kronecker_above(*arguments)
        for mine, other in zip(got, want, strict=True):
            assert mine.dtype == torch.int64
            assert torch.equal(mine, other)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-8, 1e-3, 1.0, 1e8, 1e19, 1e30])
def test_the_least_product_lets_everything_through_that_is_above(path: str, scale: float) -> None:
    """Thresholds a value equals, or is a rounding above, from where products underflow to where they overflow."""
    for gate in (name for name, gate in GATES.items() if gate.order == "product"):
        check_least_product(path, gate, scale)


def check_least_product(path: str, gate: str, scale: float) -> None:
    pre_BHP = scale * (0.1 + torch.rand(40, 30, 6))
    what = composition(gate)
    z_BF = what.function(pre_BHP[..., :2, None], pre_BHP[..., None, 2:]).flatten(1)
    of_a_token_F = z_BF[torch.randint(40, (240,)), torch.arange(240)]
    for thresholds_F in (of_a_token_F, of_a_token_F.nextafter(torch.zeros(()))):
        got = operation(path, "kronecker_above")(pre_BHP, 2, thresholds_F, what)
        want = reference.kronecker_above(pre_BHP, 2, thresholds_F, what)
        assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))


def test_a_least_product_too_large_would_be_noticed() -> None:
    pre_BHP, right = torch.rand(20, 5, 6), composition("mand")
    wrong = right._replace(least_product=lambda theta: 1.1 * theta.square())
    cpu = pytest.importorskip("kronsae.kernels.cpu")
    found = [len(cpu.kronecker_above(pre_BHP, 2, torch.full((40,), 0.5), what)[0]) for what in (right, wrong)]
    assert found[0] > found[1]


def test_head_maxima_and_pairs(path: str) -> None:
    pre_BHP = grid(7, 11, 5)
    pre_BHP[3] = -1
    for mine, other in zip(operation(path, "head_maxima")(pre_BHP, 2), reference.head_maxima(pre_BHP, 2), strict=True):
        assert torch.equal(mine, other)
    indices_BK = torch.randint(66, (7, 9))
    got = operation(path, "pairs_at")(pre_BHP.flatten(1), indices_BK, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(got.selection, parents(indices_BK, 2, 3), strict=True))
    assert torch.equal(got.rows_BR, torch.cat(got.selection[1:], dim=1))
    assert torch.equal(got.pre_BR, pre_BHP.flatten(1).gather(1, got.rows_BR))


@pytest.mark.parametrize("gate", ["mand", "minimum", "raw_product"])
def test_requests_are_the_same_in_chunks(path: str, gate: str, small_chunks: Callable[[], None]) -> None:
    x_BD, weight_HPD, bias_HP = torch.randn(150, 5).double(), torch.randn(8, 5, 5).double(), torch.randn(8, 5).double()
    requests: list[Request] = [BatchChoice(200), Above(torch.rand(48).double()), Choice(4), BatchChoice(10**6)]
    with kernels.use(path):
        whole = kronecker_linear_select(x_BD, weight_HPD, bias_HP, 2, requests, composition(gate))
        small_chunks()
        parts = kronecker_linear_select(x_BD, weight_HPD, bias_HP, 2, requests, composition(gate))
    for request, got, want in zip(requests, parts, whole, strict=True):
        if isinstance(request, Choice):  # their order is no ranking
            assert torch.equal(got.selection.indices_BK.sort().values, want.selection.indices_BK.sort().values)
            continue
        assert got.chosen_BK is not None
        assert want.chosen_BK is not None
        assert torch.equal(got.chosen_BK, want.chosen_BK)
        assert torch.equal(got.selection.indices_BK, want.selection.indices_BK)
        both_BR = torch.cat([got.chosen_BK, got.chosen_BK], dim=1)
        same_values(got.pre_BR[both_BR], want.pre_BR[both_BR])


def test_ties_across_chunks_go_to_the_earlier_token(small_chunks: Callable[[], None]) -> None:
    weight_HPD, bias_HP = torch.zeros(3, 5, 2), torch.ones(3, 5)
    small_chunks()
    [got] = kronecker_linear_select(
        torch.zeros(130, 2), weight_HPD, bias_HP, 2, [BatchChoice(18 * 65 + 7)], composition("mand")
    )
    assert got.chosen_BK is not None
    assert got.chosen_BK.sum(1).tolist() == [18] * 65 + [7] + [0] * 64
    assert got.selection.indices_BK[65, :7].tolist() == list(range(7))


def test_a_row_of_weight_0_is_not_read_and_padding_repeats(path: str) -> None:
    matrix_PD, x_BD = torch.randn(6, 5), torch.randn(4, 5)
    rows_BR = torch.tensor([[2, 3, 0, 0, 0, 0], [0] * 6, [5, 4, 3, 2, 1, 0], [1, 1, 2, 2, 2, 1]])
    got = operation(path, "sampled_products")(x_BD, matrix_PD, rows_BR)
    same_values(got, (x_BD @ matrix_PD.T).gather(1, rows_BR))
    weights_BR = torch.randn(4, 6) * (torch.rand(4, 6) < 0.5)
    same_values(
        operation(path, "weighted_rows")(weights_BR, rows_BR, matrix_PD),
        reference.weighted_rows(weights_BR, rows_BR, matrix_PD),
    )
    if path == "cpu":
        matrix_PD[0] = torch.inf
        weights_BR = (rows_BR != 0).float()
        assert operation(path, "weighted_rows")(weights_BR, rows_BR, matrix_PD).isfinite().all()
