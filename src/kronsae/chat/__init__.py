"""Asking a language model for short answers: an OpenAI-compatible endpoint or a local model, with bounds and a memory.

Knows nothing of SAEs. `Asker` is what the rest of the package holds; it composes what is here: answers on disk
(`memory`), a pace and a budget (`limits`), attempts (tenacity) and one of the models (`endpoint`, `local`).
"""

from kronsae.chat.asker import Asker, AskReport, Estimate, Estimator, Persistence
from kronsae.chat.limits import Bounds, Pace, Usage
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
    "Pace",
    "Persistence",
    "Question",
    "RefusedError",
    "TryAgainError",
    "Usage",
]
