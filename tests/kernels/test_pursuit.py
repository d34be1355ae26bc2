"""Pursuit among candidates: every path against the loop over one token at a time, in codes of all latents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.conftest import available
from tests.kernels.helpers import operation, same_values
from torch import Tensor

from kronsae.kernels import Pursued, PursuitRounds, reference

Case = tuple[Tensor, Tensor, Tensor, Tensor]
SIZES = [(1, 1, 1, 1), (5, 3, 7, 3), (9, 17, 33, 8), (12, 40, 61, 24), (3, 9, 100, 70)]  # B, D, F, C
ROUNDS = [
    PursuitRounds((1,), (0,), 0.7),
    PursuitRounds((2,), (3,), 0.7),
    PursuitRounds((2, 1), (0, 0), 1.0),
    PursuitRounds((4, 4), (1, 2), 0.7),
    PursuitRounds((4, 4), (0, 4), 0.7),
    PursuitRounds((3, 3, 2), (1, 1, 1), 0.5),
]


def case(size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """A target, a dictionary of rows of many norms (one of them 0), and candidates' values, some of them padding."""
    tokens, width, height, candidates = size
    generator = torch.Generator().manual_seed(seed)
    matrix_FD = torch.randn(height, width, generator=generator, dtype=torch.float64)
    matrix_FD *= torch.rand(height, 1, generator=generator, dtype=torch.float64) + 0.5
    matrix_FD[height // 2] = 0
    target_BD = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    order_BF = torch.rand(tokens, height, generator=generator).argsort(dim=1)
    values_BC = torch.randn(tokens, candidates, generator=generator, dtype=torch.float64).add(0.5).relu()
    return target_BD.to(dtype), matrix_FD.to(dtype), values_BC.to(dtype), order_BF[:, :candidates].contiguous()


def same(got: Pursued, want: Pursued, factor: float = 1.0) -> None:
    """The same latents in the same places, exactly; their values within the dtype's tolerance."""
    assert torch.equal(got.latents_BK, want.latents_BK)
    assert torch.equal(got.places_BK, want.places_BK)
    same_values(got.values_BK, want.values_BK, factor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rounds", ROUNDS)
def test_against_the_definition(path: str, size: tuple[int, ...], rounds: PursuitRounds) -> None:
    inputs = case(size)
    # a dozen steps, each a sum: twenty times a sum's tolerance
    same(operation(path, "pursue")(*inputs, rounds), reference.pursue(*inputs, rounds), factor=20)


@given(
    st.integers(1, 6), st.integers(4, 24), st.integers(1, 60), st.integers(1, 30),
    st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_many_random_cases(
    tokens: int, width: int, height: int, candidates: int, sizes: list[int], refit: int, seed: int
) -> None:
    inputs = case((tokens, width, height, min(candidates, height)), seed=seed)
    rounds = PursuitRounds(tuple(sizes), (min(refit, 1),) * (len(sizes) - 1) + (refit,), 0.7)
    want = reference.pursue(*inputs, rounds)
    for path in ("cpu", "portable"):
        if available(path) is None:
            same(operation(path, "pursue")(*inputs, rounds), want, factor=50)


def test_float32_is_float64_rounded(path: str) -> None:
    """Selections may differ where two candidates are equal to rounding: in 40 tokens of well-spread scores none is."""
    target_BD, matrix_FD, values_BC, latents_BC = case((40, 32, 90, 16), torch.float32, seed=3)
    rounds = PursuitRounds((4, 4), (1, 2), 0.7)
    want = reference.pursue(target_BD.double(), matrix_FD.double(), values_BC.double(), latents_BC, rounds)
    got = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, rounds)
    assert torch.equal(got.places_BK, want.places_BK)
    same_values(got.values_BK, want.values_BK, factor=3)


def test_ties_go_to_the_smaller_latent(path: str) -> None:
    """Four equal rows that fit equally well, and four equal values before them: in both rounds the smaller two."""
    matrix_FD = torch.eye(8, dtype=torch.float64).repeat_interleave(4, dim=0)
    target_BD = torch.zeros(1, 8, dtype=torch.float64)
    target_BD[0, 0], target_BD[0, 3] = 2, 1
    latents_BC = torch.tensor([[15, 2, 14, 1, 12, 0, 13, 3]])
    values_BC = torch.tensor([[0.5, 1, 0.5, 1, 0.5, 1, 0.5, 1]], dtype=torch.float64)
    got = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, PursuitRounds((2, 2), (0, 0), 0.7))
    assert got.latents_BK.tolist() == [[1, 0, 12, 13]]
    assert got.places_BK.tolist() == [[3, 5, 4, 6]]
    assert got.values_BK.tolist() == [[1.0, 1.0, 0.7, 0.7]]


def test_a_case_by_hand(path: str) -> None:
    """Two rows at right angles, of norm 1 and 2, both as much too small: one step is the solution."""
    matrix_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]], dtype=torch.float64)
    target_BD = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    codes = torch.tensor([[1.0, 1.0]], dtype=torch.float64), torch.tensor([[0, 1]])
    got = operation(path, "pursue")(target_BD, matrix_FD, *codes, PursuitRounds((2,), (1,), 0.7))
    assert got.values_BK.tolist() == [[3.0, 2.0]]
    # one at a time: latent 1's value 1.5 leaves (3, 1), of which latent 0 explains 3 and starts at half of that
    codes = torch.tensor([[1.0, 1.5]], dtype=torch.float64), torch.tensor([[0, 1]])
    got = operation(path, "pursue")(target_BD, matrix_FD, *codes, PursuitRounds((1, 1), (0, 0), 0.5))
    assert got.latents_BK.tolist() == [[1, 0]]
    assert got.values_BK.tolist() == [[1.5, 1.5]]


def test_as_many_steps_as_rows_are_the_best_values(path: str) -> None:
    """Conjugate gradients end after as many steps as there are values, if none meets its bound."""
    generator = torch.Generator().manual_seed(1)
    matrix_FD = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    best_BC = torch.rand(20, 6, generator=generator, dtype=torch.float64) + 0.5
    latents_BC = torch.arange(6).expand(20, 6).contiguous()
    started_BC = best_BC * (1 + 0.1 * torch.randn(20, 6, generator=generator, dtype=torch.float64)).clamp(0.8, 1.2)
    errors = []
    for steps in range(7):
        rounds = PursuitRounds((6,), (steps,), 0.7)
        got = operation(path, "pursue")(best_BC @ matrix_FD, matrix_FD, started_BC, latents_BC, rounds)
        errors.append(float(((got.values_BK - best_BC) @ matrix_FD).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[6] < 1e-20 * errors[0]
    assert errors[1] > 1e-4 * errors[0]  # fewer steps are not enough


@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_no_step_raises_the_error_of_any_token(path: str, alike: float) -> None:
    """Also where rows are so much alike that steps of one size would diverge, and values meet their bound."""
    target_BD, matrix_FD, values_BC, latents_BC = case((200, 6, 20, 8), seed=2)
    matrix_FD += alike * matrix_FD[0]
    before_B = torch.full((200,), torch.inf, dtype=torch.float64)
    bounded = 0
    for steps in range(6):
        found = operation(path, "pursue")(
            target_BD, matrix_FD, values_BC, latents_BC, PursuitRounds((8,), (steps,), 0.7)
        )
        explained_BD = (found.values_BK.unsqueeze(2) * matrix_FD[found.latents_BK]).sum(1)
        error_B = (target_BD - explained_BD).square().sum(1)
        assert (error_B <= before_B + 1e-9).all(), steps
        before_B, bounded = error_B, int(((found.values_BK == 0) & (found.places_BK >= 0)).sum())
    assert bounded > 50


def test_few_or_no_candidates(path: str) -> None:
    target_BD, matrix_FD, values_BC, latents_BC = case((3, 5, 12, 4))
    values_BC[0], values_BC[1, 1:] = 0, 0
    values_BC[1, 0] = 1
    got = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, PursuitRounds((3, 3), (1, 1), 0.7))
    assert got.values_BK[0].tolist() == [0.0] * 6
    assert got.places_BK[0].tolist() == [-1] * 6
    assert (got.places_BK[1] >= 0).sum() == 1
    empty = (target_BD[:0], matrix_FD, values_BC[:0], latents_BC[:0])
    assert operation(path, "pursue")(*empty, PursuitRounds((3, 3), (1, 1), 0.7)).values_BK.shape == (0, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_is_seen_and_alone(path: str, bad: float) -> None:
    target_BD, matrix_FD, values_BC, latents_BC = case((3, 5, 12, 4))
    rounds = PursuitRounds((2, 1), (1, 1), 0.7)
    want = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, rounds)
    values_BC[1, 2] = bad
    got = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, rounds)
    assert got.values_BK[1].isnan().all()
    assert got.places_BK[1].tolist() == [-1] * 3
    assert torch.equal(got.values_BK[[0, 2]], want.values_BK[[0, 2]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("where", ["target", "row"])
@pytest.mark.parametrize("rounds", [PursuitRounds((8,), (1,), 0.7), PursuitRounds((4, 4), (1, 2), 0.7)])
def test_what_is_not_finite_is_seen_and_stays_where_it_is(
    path: str, bad: float, where: str, rounds: PursuitRounds
) -> None:
    """A target or a row with NaN, infinity or a square that overflows: of other tokens not one bit differs."""
    if path == "reference" and where == "row":
        pytest.skip("it multiplies all rows, most of them by 0")
    inputs = case((60, 5, 40, 8), torch.float32, seed=4)
    want = operation(path, "pursue")(*inputs, rounds)
    target_BD, matrix_FD, values_BC, latents_BC = (part.clone() for part in inputs)
    touched_B = torch.arange(60) == 7
    if where == "target":
        target_BD[7, 2] = bad
    else:
        matrix_FD[3, 2] = bad
        touched_B = (latents_BC == 3).any(1)
    assert 0 < touched_B.sum() < 30
    got = operation(path, "pursue")(target_BD, matrix_FD, values_BC, latents_BC, rounds)
    assert torch.equal(got.values_BK[~touched_B], want.values_BK[~touched_B])
    assert torch.equal(got.latents_BK[~touched_B], want.latents_BK[~touched_B])
    assert got.values_BK[touched_B].isnan().any()


def test_float16_is_refitted_though_its_squares_overflow() -> None:
    target_BD, matrix_FD, values_BC, latents_BC = case((40, 32, 90, 16), torch.float32, seed=3)
    rounds, scale = PursuitRounds((4, 4), (1, 2), 0.7), 200
    exact = (target_BD * scale, matrix_FD, values_BC * scale, latents_BC)
    rounded = [part.half() if part.is_floating_point() else part for part in exact]
    want, got = (operation("portable", "pursue")(*inputs, rounds) for inputs in (exact, rounded))
    assert (target_BD * scale).square().sum(1).max() > torch.finfo(torch.float16).max
    dense = [torch.zeros(40, 90).scatter_add_(1, found.latents_BK, found.values_BK.float()) for found in (want, got)]
    same_share = ((dense[0] - dense[1]).abs() <= 0.02 * scale).all(1).float().mean()
    assert same_share > 0.8  # the others choose another latent of nearly equal worth


def test_memory_is_written_before_it_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rounds = case((9, 17, 33, 8)), PursuitRounds((3, 3), (1, 2), 0.7)
    want = reference.pursue(*inputs, rounds)
    plain = torch.empty

    def poisoned(*size: object, dtype: torch.dtype = torch.float32) -> Tensor:
        made: Tensor = plain(*size, dtype=dtype)  # type: ignore[call-overload]
        return made.fill_(torch.nan if dtype.is_floating_point else 10**6)

    monkeypatch.setattr(torch, "empty", poisoned)
    same(operation(path, "pursue")(*inputs, rounds), want, factor=20)


def test_the_suite_would_notice_a_wrong_share() -> None:
    inputs = case(SIZES[2])
    right, wrong = (reference.pursue(*inputs, PursuitRounds((4, 4), (0, 0), start)) for start in (0.7, 0.71))
    with pytest.raises(AssertionError):
        same(wrong, right, factor=50)
