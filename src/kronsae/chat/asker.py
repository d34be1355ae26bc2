"""Asking questions: answers come from disk if known, else from the model, with rate limits, budget and retries."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from kronsae.chat.limits import Bounds, Budget, RateLimiter, Usage
from kronsae.chat.memory import AnswerMemory
from kronsae.chat.question import Answer, ChatModel, Question, RefusedError, TryAgainError
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """Settings of concurrency and retries.

    Args:
        concurrency: number of concurrent questions.
        attempts: largest number of attempts per question.
        backoff_seconds: the wait before the n-th attempt is random, up to ``backoff_seconds * 2^(n-2)``, and at least
            the server's Retry-After.
        max_wait_seconds: longest wait; if a server asks for more, the work ends.
        give_up_after: number of unanswered questions in a row that ends the work.
    """

    concurrency: int = 8
    attempts: int = 5
    backoff_seconds: float = 2.0
    max_wait_seconds: float = 120.0
    give_up_after: int = 5

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "give_up_after"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)!r}.")
        for name in ("backoff_seconds", "max_wait_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be above 0 and finite; got {getattr(self, name)!r}.")


@dataclass
class AskReport:
    """Counts of questions and failures; updated while questions are asked.

    Args:
        remembered: questions answered from disk.
        answered: questions answered by the model.
        failed_attempts: attempts without an answer, by reason; a later attempt may have succeeded.
        unanswered: questions without an answer, by the reason of the last attempt.
    """

    remembered: int = 0
    answered: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)


class Asker:
    """Callable that takes instructions, content and the answer's schema and returns the text of the answer.

    It returns None without an answer.

    Retries use tenacity and not the client library, because each attempt must respect rate limits and budget, and
    because unreadable answers are retried too. The client's own retries are off.

    Args:
        model: the model that answers.
        memory: the answers on disk.
        bounds: the budget.
        rate_limiter: limits requests and tokens per minute.
        retry: concurrency and retries.
        sleep: waits the given number of seconds.

    Raises:
        UserError: the extra ``autointerp`` is not installed; or, when called: a bound is reached, the model refuses
            every question, or too many questions in a row failed. Answers received before are kept.
    """

    def __init__(
        self,
        model: ChatModel,
        memory: AnswerMemory,
        *,
        bounds: Bounds,
        rate_limiter: RateLimiter,
        retry: RetrySettings,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if find_spec("tenacity") is None:
            raise UserError(
                "asking a language model needs tenacity. Install it with: pip install 'kronsae[autointerp]'"
            )
        self._model, self._memory = model, memory
        self._budget, self._rate_limiter = Budget(bounds), rate_limiter
        self._retry, self._sleep = retry, sleep
        self._slots = asyncio.Semaphore(retry.concurrency)
        self._under_way: set[asyncio.Task[Answer]] = set()
        self._failed_in_a_row, self._last_reason = 0, ""
        self.report = AskReport()

    @property
    def spent(self) -> Usage:
        """Requests sent and tokens used so far."""
        return self._budget.spent

    async def __call__(self, instructions: str, content: str, schema: Mapping[str, Any] | None = None) -> str | None:
        question = Question(instructions=instructions, content=content, schema=schema)
        known = self._memory.find(self._model.identity, question)
        if known is not None:
            self.report.remembered += 1
            return known.text
        async with self._slots:
            self._check_failures()  # the failure that freed this slot may have been one too many
            try:
                answer = await self._ask_with_retries(question)
            except RefusedError as error:
                self.report.failed_attempts[str(error)] += 1
                self._count_unanswered(str(error))
                return None
            except TryAgainError as error:
                self._count_unanswered(error.reason)
                return None
        self.report.answered += 1
        self._failed_in_a_row = 0
        return answer.text

    async def close(self) -> None:
        """Wait for pending requests, which are paid for, keep their answers, and close the model."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._model.close()

    def _count_unanswered(self, reason: str) -> None:
        self.report.unanswered[reason] += 1
        self._failed_in_a_row, self._last_reason = self._failed_in_a_row + 1, reason
        self._check_failures()

    def _check_failures(self) -> None:
        if self._failed_in_a_row >= self._retry.give_up_after:
            raise UserError(
                f"the language model must answer; {self._failed_in_a_row} questions in a row had no answer (the last: "
                f"{self._last_reason}). Answers are kept: run the same command again when the model works."
            )

    async def _ask_with_retries(self, question: Question) -> Answer:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
        from tenacity import wait_random_exponential as random_exponential

        limits = self._retry
        backoff = random_exponential(multiplier=limits.backoff_seconds, max=limits.max_wait_seconds)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.retry_after if isinstance(error, TryAgainError) else None
            return max(0.0 if asked is None else asked, backoff(state))

        attempts = AsyncRetrying(
            sleep=self._sleep,
            wait=wait,
            stop=stop_after_attempt(limits.attempts),
            retry=retry_if_exception_type(TryAgainError),
            reraise=True,
        )
        answer: Answer = await attempts(self._attempt, question)
        return answer

    async def _attempt(self, question: Question) -> Answer:
        largest = _largest_usage(question, self._model.max_answer_tokens)
        await self._rate_limiter.wait(largest.tokens)
        self._budget.reserve(largest)
        # A separate, shielded task: if the work is stopped, answers already paid for are still received and kept.
        task = asyncio.create_task(self._send(question, largest))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except TryAgainError as error:
            self.report.failed_attempts[error.reason] += 1
            if error.retry_after is not None:
                if error.retry_after > self._retry.max_wait_seconds:
                    raise UserError(
                        f"the language model asks for a wait of {error.retry_after:.0f} s ({error.reason}), "
                        f"longer than max_wait_seconds={self._retry.max_wait_seconds:g}. Answers are kept: "
                        "run the same command again later."
                    ) from None
                self._rate_limiter.pause(error.retry_after)
            raise

    async def _send(self, question: Question, promised: Usage) -> Answer:
        spent = Usage(requests=1)
        try:
            answer = await self._model.answer(question)
            spent = Usage(requests=1, tokens_in=answer.tokens_in, tokens_out=answer.tokens_out)
        except TryAgainError as error:
            spent = promised if error.perhaps_paid else spent
            raise
        finally:
            self._budget.settle(promised, spent)
        self._memory.keep(self._model.identity, question, answer)
        return answer


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost of asking.

    Args:
        remembered: questions whose answers are on disk.
        usage: requests and tokens of the other questions, each asked once. Tokens are estimated from bytes, and
            answers are assumed to have the largest allowed length.
    """

    remembered: int
    usage: Usage


class Estimator:
    """Replaces an `Asker` to estimate its cost: returns answers from disk, else ``placeholder``.

    Args:
        model: the model that would answer.
        memory: the answers on disk.
        placeholder: replaces an unknown answer; later questions may contain parts of it.
    """

    def __init__(self, model: ChatModel, memory: AnswerMemory, *, placeholder: str) -> None:
        self._model, self._memory, self._placeholder = model, memory, placeholder
        self._usage, self._remembered = Usage(), 0

    async def __call__(self, instructions: str, content: str, schema: Mapping[str, Any] | None = None) -> str | None:
        question = Question(instructions=instructions, content=content, schema=schema)
        known = self._memory.find(self._model.identity, question)
        if known is not None:
            self._remembered += 1
            return known.text
        self._usage += _largest_usage(question, self._model.max_answer_tokens)
        return self._placeholder

    def value(self) -> Estimate:
        """Return the estimate for the questions so far."""
        return Estimate(remembered=self._remembered, usage=self._usage)


def _largest_usage(question: Question, max_answer_tokens: int) -> Usage:
    return Usage(requests=1, tokens_in=question.estimated_tokens, tokens_out=max_answer_tokens)
