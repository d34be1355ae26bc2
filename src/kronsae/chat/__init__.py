"""Short answers from a language model, behind an OpenAI-compatible endpoint or local, with limits and a disk cache.

This room knows nothing of SAEs. The rest of the package uses `Asker`, which combines answers on disk (`memory`), rate
limits and a budget (`limits`), retries (tenacity) and one of the models (`endpoint`, `local`).
"""

from kronsae.chat.asker import Asker, AskReport, Estimate, Estimator, RetrySettings
from kronsae.chat.limits import Bounds, RateLimiter, Usage
from kronsae.chat.memory import AnswerMemory
from kronsae.chat.question import Answer, ChatModel, Question, RefusedError, TryAgainError

__all__ = [
    "Answer",
    "AnswerMemory",
    "AskReport",
    "Asker",
    "Bounds",
    "ChatModel",
    "Estimate",
    "Estimator",
    "Question",
    "RateLimiter",
    "RefusedError",
    "RetrySettings",
    "TryAgainError",
    "Usage",
]
