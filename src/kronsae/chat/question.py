"""Question, answer, the interface of a model, and the two kinds of failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

BYTES_PER_TOKEN = 3
"""For estimating tokens without a tokenizer: English prose has about 4 bytes of UTF-8 per token, JSON and code 3."""
TEMPLATE_TOKENS = 20
"""Tokens that a chat template adds to a question: role names and separators."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question: ``instructions`` is the system message, ``content`` the user message.

    ``schema`` is the JSON schema of the answer that the instructions ask for. Only a model with structured answers uses
    it.
    """

    instructions: str
    content: str
    schema: Mapping[str, Any] | None = None

    @property
    def estimated_tokens(self) -> int:
        """Number of tokens of the question, estimated from its size in bytes (`BYTES_PER_TOKEN`)."""
        size = len(self.instructions.encode()) + len(self.content.encode())
        return TEMPLATE_TOKENS - (-size // BYTES_PER_TOKEN)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and its token counts, as reported by the model, or estimated if it reports none."""

    text: str
    tokens_in: int
    tokens_out: int


class ChatModel(Protocol):
    """Interface of a model that answers questions."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that the answer depends on besides the question, as JSON values, without secrets."""
        ...

    @property
    def max_answer_tokens(self) -> int:
        """Largest length of an answer in tokens; longer ones are cut off."""
        ...

    async def answer(self, question: Question) -> Answer:
        """Answer a question with one attempt.

        Raises:
            TryAgainError: the attempt failed, but a later one may succeed.
            RefusedError: the model never answers this question.
            UserError: the model never answers any question (a wrong key, no such model).
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class TryAgainError(Exception):
    """A temporary failure.

    Args:
        reason: a few words.
        retry_after: seconds that the model asked to wait; None if it did not say.
        perhaps_paid: whether the model may have processed the question although no answer arrived.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, perhaps_paid: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.perhaps_paid = reason, retry_after, perhaps_paid


class RefusedError(Exception):
    """The model refuses this question permanently."""
