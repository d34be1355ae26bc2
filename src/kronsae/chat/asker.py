"""Asks questions: from memory where it can, else within pace and budget, again where that may help."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

from kronsae.chat.limits import Bounds, Pace, Purse, Usage
from kronsae.chat.memory import AnswerMemory
from kronsae.chat.question import Answer, ChatModel, Question, RefusedError, TryAgainError
from kronsae.support.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Persistence:
    """How hard to try.

    Args:
        concurrency: questions under way at once.
        attempts: per question.
        backoff_seconds: before the n-th attempt a random time up to ``backoff_seconds * 2^(n-2)`` is waited, and at
            least what the server's Retry-After asked.
        max_wait_seconds: no wait is longer; a server that asks for more ends the work.
        give_up_after: so many questions without an answer in a row end the work.
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
    """What asking came to; grows while it goes on.

    Args:
        remembered: questions answered from memory.
        answered: questions answered by the model.
        failed_attempts: attempts without an answer, by reason; another attempt may have had one.
        unanswered: questions that were left without an answer, by the last reason.
    """

    remembered: int = 0
    answered: int = 0
    failed_attempts: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)


class Asker:
    """Call it with instructions and content to get the answer's text, or None where there is none to be had.

    Attempts are tenacity's and not the client library's, because each one has to pass pace and budget and because
    answers that cannot be read are tried again too; the client's own retries are off.

    Args:
        model: who answers.
        memory: where answers are kept.
        bounds: what may be spent.
        pace: how fast.
        persistence: how hard to try.
        sleep: waits so many seconds.

    Raises:
        UserError: the extra ``autointerp`` is not installed; or, when called: a bound is reached, the model refuses
            altogether, or too many questions in a row failed. Answers that are there by then are kept.
    """

    def __init__(
        self,
        model: ChatModel,
        memory: AnswerMemory,
        *,
        bounds: Bounds,
        pace: Pace,
        persistence: Persistence,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if find_spec("tenacity") is None:
            raise UserError("asking a language model needs tenacity: pip install 'kronsae[autointerp]'.")
        self._model, self._memory = model, memory
        self._purse, self._pace, self._persistence, self._sleep = Purse(bounds), pace, persistence, sleep
        self._places = asyncio.Semaphore(persistence.concurrency)
        self._under_way: set[asyncio.Task[Answer]] = set()
        self._failed_in_a_row, self._last_reason = 0, ""
        self.report = AskReport()

    @property
    def spent(self) -> Usage:
        """What was sent and came back so far."""
        return self._purse.spent

    async def __call__(self, instructions: str, content: str) -> str | None:
        question = Question(instructions=instructions, content=content)
        known = self._memory.find(self._model.identity, question)
        if known is not None:
            self.report.remembered += 1
            return known.text
        async with self._places:
            self._check_patience()  # the last failure may have freed this very place
            try:
                answer = await self._persistently(question)
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
        """Wait for the requests under way, which are paid for, and keep their answers; then let the model go."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._model.close()

    def _count_unanswered(self, reason: str) -> None:
        self.report.unanswered[reason] += 1
        self._failed_in_a_row, self._last_reason = self._failed_in_a_row + 1, reason
        self._check_patience()

    def _check_patience(self) -> None:
        if self._failed_in_a_row >= self._persistence.give_up_after:
            raise UserError(
                f"the language model left {self._failed_in_a_row} questions in a row without an answer (the last: "
                f"{self._last_reason}). What was answered is kept: give the same command again when it works."
            )

    async def _persistently(self, question: Question) -> Answer:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
        from tenacity import wait_random_exponential as random_exponential

        limits = self._persistence
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
        largest = _largest(question, self._model.max_answer_tokens)
        await self._pace.wait(largest.tokens)
        self._purse.promise(largest)
        # A task of its own, shielded: when the work is stopped, what is already paid for is still waited for and kept.
        task = asyncio.create_task(self._send(question, largest))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except TryAgainError as error:
            self.report.failed_attempts[error.reason] += 1
            if error.retry_after is not None:
                if error.retry_after > self._persistence.max_wait_seconds:
                    raise UserError(
                        f"the language model asks to be left alone for {error.retry_after:.0f} s ({error.reason}), "
                        f"longer than max_wait_seconds={self._persistence.max_wait_seconds:g}. What was answered is "
                        "kept: give the same command again later."
                    ) from None
                self._pace.pause(error.retry_after)
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
            self._purse.settle(promised, spent)
        self._memory.keep(self._model.identity, question, answer)
        return answer


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What asking will come to.

    Args:
        remembered: questions whose answers are known already.
        usage: the others, once each: their requests, tokens estimated from bytes, answers as long as they may be.
    """

    remembered: int
    usage: Usage


class Estimator:
    """Stands in for an `Asker` to find out what it would cost: answers from memory, else with ``placeholder``.

    Args:
        model: who would answer.
        memory: where answers are kept.
        placeholder: stands for an answer that is not known; later questions may contain parts of it.
    """

    def __init__(self, model: ChatModel, memory: AnswerMemory, *, placeholder: str) -> None:
        self._model, self._memory, self._placeholder = model, memory, placeholder
        self._usage, self._remembered = Usage(), 0

    async def __call__(self, instructions: str, content: str) -> str | None:
        question = Question(instructions=instructions, content=content)
        known = self._memory.find(self._model.identity, question)
        if known is not None:
            self._remembered += 1
            return known.text
        self._usage += _largest(question, self._model.max_answer_tokens)
        return self._placeholder

    def value(self) -> Estimate:
        """What was asked so far."""
        return Estimate(remembered=self._remembered, usage=self._usage)


def _largest(question: Question, max_answer_tokens: int) -> Usage:
    return Usage(requests=1, tokens_in=question.estimated_tokens, tokens_out=max_answer_tokens)
