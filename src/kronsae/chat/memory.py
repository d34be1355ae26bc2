"""Answers on disk, so that nothing is asked, or paid for, twice."""

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
    """One JSON file per answer, named by the SHA-256 of the question and of all that its answer depends on.

    A file is written whole or not at all, so a killed process loses at most the answers that were under way. A file
    that is not what this class writes counts as not there.

    Args:
        folder: where the files are; made when the first answer is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def key(identity: Mapping[str, Any], question: Question) -> str:
        """64 hex digits: the hash of model, settings and prompt as canonical JSON."""
        whole = {"model": dict(identity), "question": asdict(question)}
        return hashlib.sha256(json.dumps(whole, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def find(self, identity: Mapping[str, Any], question: Question) -> Answer | None:
        """The answer that was kept, if there is one."""
        path = self._path(self.key(identity, question))
        try:
            found = read_json(path, "an answer") if path.exists() else None
        except UserError:  # damaged by something else: ask again, and write it anew
            return None
        answer = found.get("answer") if isinstance(found, dict) else None
        if not isinstance(answer, dict):
            return None
        text, tokens_in, tokens_out = (answer.get(name) for name in ("text", "tokens_in", "tokens_out"))
        if not (isinstance(text, str) and isinstance(tokens_in, int) and isinstance(tokens_out, int)):
            return None
        return Answer(text=text, tokens_in=tokens_in, tokens_out=tokens_out)

    def keep(self, identity: Mapping[str, Any], question: Question, answer: Answer) -> None:
        """Write the answer, with the question it belongs to."""
        value = {"model": dict(identity), "question": asdict(question), "answer": asdict(answer)}
        write_json(self._path(self.key(identity, question)), value)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
