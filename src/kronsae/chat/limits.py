"""Rate limits and budget of questions."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kronsae.support.errors import UserError

MINUTE = 60.0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Number of requests, and of tokens in questions and answers."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            requests=self.requests + other.requests,
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
        )

    @property
    def tokens(self) -> int:
        """Tokens of questions and answers together."""
        return self.tokens_in + self.tokens_out


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Budget; None: no bound.

    Args:
        max_requests: number of attempts sent, including failed ones.
        max_tokens: tokens of questions and answers together.
        max_cost: cost in the currency of the prices.
        price_in, price_out: price per million tokens of questions and of answers.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens", "max_cost", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} must be at least 0 and finite; got {value!r}.")
        if (self.price_in is None) != (self.price_out is None):
            raise UserError("price_in and price_out must be given together. Give both or none.")
        if self.max_cost is not None and self.price_in is None:
            raise UserError("max_cost needs price_in and price_out, per million tokens. Give these too.")

    def cost(self, usage: Usage) -> float | None:
        """Return ``(tokens_in price_in + tokens_out price_out) / 1e6``; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (usage.tokens_in * self.price_in + usage.tokens_out * self.price_out) / 1e6

    def exceeded_by(self, usage: Usage) -> str:
        """Describe the bound that ``usage`` exceeds; "" if none."""
        if self.max_requests is not None and usage.requests > self.max_requests:
            return f"max_requests={self.max_requests:,} ({usage.requests:,} requests)"
        if self.max_tokens is not None and usage.tokens > self.max_tokens:
            return f"max_tokens={self.max_tokens:,} ({usage.tokens:,} tokens)"
        cost = self.cost(usage)
        if self.max_cost is not None and cost is not None and cost > self.max_cost:
            return f"max_cost={self.max_cost:g} ({cost:.4g})"
        return ""


class Budget:
    """Tracks spent and reserved usage, and refuses a request that `Bounds` does not allow."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._reserved = Usage()
        self.spent = Usage()

    def reserve(self, request: Usage) -> None:
        """Reserve ``request`` before it is sent.

        Raises:
            UserError: it would exceed a bound.
        """
        total = self.spent + self._reserved + request
        if excess := self._bounds.exceeded_by(total):
            raise UserError(
                f"stopped before the next request would exceed {excess}; {self.spent.requests:,} requests and "
                f"{self.spent.tokens:,} tokens were spent. Answers are kept: raise the bound and run the same command "
                "again to continue."
            )
        self._reserved += request

    def settle(self, request: Usage, spent: Usage) -> None:
        """Replace the reservation of ``request`` by its actual usage."""
        self._reserved += Usage(
            requests=-request.requests, tokens_in=-request.tokens_in, tokens_out=-request.tokens_out
        )
        self.spent += spent


class RateLimiter:
    """Rate limit on requests and tokens in any 60 seconds; requests wait in a queue.

    Args:
        requests_per_minute, tokens_per_minute: limits; None: no limit.
        clock: monotonic clock in seconds.
        sleep: waits the given number of seconds.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value!r}.")
        self._requests, self._tokens = requests_per_minute, tokens_per_minute
        self._clock, self._sleep = clock, sleep
        self._line = asyncio.Lock()
        self._sent: deque[tuple[float, int]] = deque()
        self._sum = 0
        self._not_before = 0.0

    async def wait(self, tokens: int) -> None:
        """Wait until a request of this many tokens (question and longest answer) may be sent.

        Raises:
            UserError: the request alone exceeds the limit of a minute.
        """
        if self._tokens is not None and tokens > self._tokens:
            raise UserError(
                f"tokens_per_minute must allow the largest request, of about {tokens:,} tokens; got {self._tokens:,}. "
                "Raise it, or shorten the prompts."
            )
        async with self._line:
            while (delay := self._delay(tokens)) > 0:
                await self._sleep(delay)
            self._sent.append((self._clock(), tokens))
            self._sum += tokens

    def pause(self, seconds: float) -> None:
        """Send nothing for this many seconds: a server's Retry-After applies to all requests."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def _delay(self, tokens: int) -> float:
        now = self._clock()
        while self._sent and self._sent[0][0] <= now - MINUTE:
            self._sum -= self._sent.popleft()[1]
        too_many = self._requests is not None and len(self._sent) >= self._requests
        too_much = self._tokens is not None and self._sum + tokens > self._tokens
        oldest_leaves = self._sent[0][0] + MINUTE - now if self._sent and (too_many or too_much) else 0.0
        return max(oldest_leaves, self._not_before - now)
