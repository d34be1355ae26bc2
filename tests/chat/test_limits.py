from __future__ import annotations

import asyncio

import pytest

from kronsae.chat.limits import Bounds, Budget, RateLimiter, Usage
from kronsae.support.errors import UserError


class Time:
    """A clock that advances only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def sent_at(sizes: list[int], **limits: int) -> list[float]:
    time = Time()
    times = []

    async def run() -> None:
        rate_limiter = RateLimiter(**limits, clock=lambda: time.now, sleep=time.sleep)
        for size in sizes:
            await rate_limiter.wait(size)
            times.append(time.now)

    asyncio.run(run())
    return times


def test_no_minute_has_more_requests_than_allowed() -> None:
    assert sent_at([1] * 7, requests_per_minute=3) == [0, 0, 0, 60, 60, 60, 120]


def test_no_minute_has_more_tokens_than_allowed() -> None:
    assert sent_at([40, 40, 40, 90, 10], tokens_per_minute=100) == [0, 0, 60, 120, 120]


def test_both_limits_hold_together() -> None:
    assert sent_at([10, 10, 90], requests_per_minute=10, tokens_per_minute=100) == [0, 0, 60]


def test_without_limits_nothing_waits() -> None:
    assert sent_at([10**9] * 3) == [0, 0, 0]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokens_per_minute must allow the largest request, of about 101 tokens"):
        sent_at([101], tokens_per_minute=100)


def test_a_pause_holds_for_all() -> None:
    time = Time()

    async def run() -> float:
        rate_limiter = RateLimiter(clock=lambda: time.now, sleep=time.sleep)
        rate_limiter.pause(30)
        rate_limiter.pause(10)
        await rate_limiter.wait(1)
        return time.now

    assert asyncio.run(run()) == 30


def test_cost_by_hand() -> None:
    bounds = Bounds(price_in=2.0, price_out=10.0)
    assert bounds.cost(Usage(tokens_in=500_000, tokens_out=100_000)) == 2.0
    assert Bounds().cost(Usage(tokens_in=1)) is None


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        (Bounds(max_requests=2), "max_requests=2 (3 requests)"),
        (Bounds(max_tokens=399), "max_tokens=399 (400 tokens)"),
        (Bounds(max_cost=0.00049, price_in=1.0, price_out=2.0), "max_cost=0.00049 (0.0005)"),
        (Bounds(max_requests=3, max_tokens=400, max_cost=0.0005, price_in=1.0, price_out=2.0), ""),
        (Bounds(), ""),
    ],
)
def test_which_bound_is_exceeded(bounds: Bounds, named: str) -> None:
    assert bounds.exceeded_by(Usage(requests=3, tokens_in=300, tokens_out=100)) == named


def test_a_budget_counts_reserved_usage() -> None:
    budget = Budget(Bounds(max_tokens=100))
    large, small = Usage(requests=1, tokens_in=30, tokens_out=30), Usage(requests=1, tokens_in=30, tokens_out=5)
    budget.reserve(large)
    with pytest.raises(UserError, match=r"stopped before the next request would exceed max_tokens=100 \(120 tokens\)"):
        budget.reserve(large)
    budget.settle(large, small)
    assert budget.spent == small
    budget.reserve(large)  # 35 + 60


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_requests": -1}, "max_requests must be at least 0 and finite; got -1"),
        ({"price_in": float("nan"), "price_out": 1.0}, "price_in must be at least 0 and finite; got nan"),
        ({"price_in": 1.0}, "price_in and price_out must be given together"),
        ({"max_cost": 1.0}, "max_cost needs price_in and price_out"),
    ],
)
def test_bounds_that_make_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bounds(**values)  # type: ignore[arg-type]


def test_a_pace_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="requests_per_minute must be at least 1; got 0"):
        RateLimiter(requests_per_minute=0)
