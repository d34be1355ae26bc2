"""Answers on disk, so that no question is asked or paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kronsae.chat.question import Answer, Question
from kronsae.support.errors import UserError
from kronsae.support.files import read_json, write_json


class AnswerMemory:
    """One JSON file per answer, named by the SHA-256 of the question and all that its answer depends on.

    Files are written atomically, so a killed process loses at most the pending answers. A file that this class did not
    write is treated as missing.

    Args:
        folder: folder of the files; created with the first answer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def key(identity: Mapping[str, Any], question: Question) -> str:
        """Return 64 hex digits: the hash of model, settings and prompt as canonical JSON."""
        whole = {"model": dict(identity), "question": _messages(question)}
        return hashlib.sha256(json.dumps(whole, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def find(self, identity: Mapping[str, Any], question: Question) -> Answer | None:
        """Return the stored answer; None if there is none."""
        path = self._path(self.key(identity, question))
        try:
            found = read_json(path, "an answer") if path.exists() else None
        except UserError:  # damaged: ask again and overwrite it
            return None
        answer = found.get("answer") if isinstance(found, dict) else None
        if not isinstance(answer, dict):
            return None
        text, tokens_in, tokens_out = (answer.get(name) for name in ("text", "tokens_in", "tokens_out"))
        if not (isinstance(text, str) and isinstance(tokens_in, int) and isinstance(tokens_out, int)):
            return None
        return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out)

    def keep(self, identity: Mapping[str, Any], question: Question, answer: Answer) -> None:
        """Write the answer together with its question."""
        value = {"model": dict(identity), "question": _messages(question), "answer": asdict(answer)}
        write_json(self._path(self.key(identity, question)), value)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


def _messages(question: Question) -> dict[str, str]:
    """Return the messages, which also determine the answer's form."""
    return {"instructions": question.instructions, "content": question.content}
