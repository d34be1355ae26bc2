"""A question, its answer, who answers, and the two ways in which there may be no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

BYTES_PER_TOKEN = 3
"""To tell tokens without a tokenizer: English prose has about 4 bytes of UTF-8 per token, JSON and code about 3."""
TEMPLATE_TOKENS = 20
"""What a chat template adds to a question: role names and separators."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: ``instructions`` is the system's part, ``content`` the user's."""

    instructions: str
    content: str

    @property
    def estimated_tokens(self) -> int:
        """Tokens of the question, from its size in bytes (`BYTES_PER_TOKEN`)."""
        size = len(self.instructions.encode()) + len(self.content.encode())
        return TEMPLATE_TOKENS - (-size // BYTES_PER_TOKEN)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back, and the tokens it took, as the model reports them (or estimated, where it does not)."""

    text: str
    tokens_in: int
    tokens_out: int


class ChatModel(Protocol):
    """Whoever answers."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that the answer depends on besides the question, as JSON values; no secret is among it."""
        ...

    @property
    def max_answer_tokens(self) -> int:
        """An answer is cut off after so many tokens."""
        ...

    async def answer(self, question: Question) -> Answer:
        """Answer once.

        Raises:
            TryAgainError: not now, but perhaps later.
            RefusedError: never to this question.
            UserError: never to any question (a wrong key, no such model).
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class TryAgainError(Exception):
    """A failure that may pass.

    Args:
        reason: a few words.
        retry_after: seconds the model asked to be left alone; None if it did not say.
        perhaps_paid: whether the model may have worked on the question, although no answer came.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, perhaps_paid: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.perhaps_paid = reason, retry_after, perhaps_paid


class RefusedError(Exception):
    """The model will not answer this question, however often it is asked."""
