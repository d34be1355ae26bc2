"""Test that a killed process loses only its unfinished requests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.chat.stub import Reply, Stub, completion, serving

from kronsae.chat import AnswerMemory, Asker, Bounds, RateLimiter, RetrySettings
from kronsae.chat.endpoint import EndpointModel, endpoint_from_environment

QUESTIONS, ANSWERED = 30, 10

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.chat.test_resume import ask_all
ask_all(Path(sys.argv[1]))
"""


def ask_all(folder: Path, environment: dict[str, str] | None = None) -> list[str | None]:
    """Ask the questions one after another."""

    async def run() -> list[str | None]:
        model = EndpointModel(*endpoint_from_environment(environment=environment))
        one_by_one = RetrySettings(concurrency=1)
        asker = Asker(model, AnswerMemory(folder), bounds=Bounds(), rate_limiter=RateLimiter(), retry=one_by_one)
        try:
            return [await asker("Repeat.", str(number)) for number in range(QUESTIONS)]
        finally:
            await asker.close()

    return asyncio.run(run())


def content(stub: Stub) -> list[str]:
    return [request["messages"][1]["content"] for request in stub.requests]


def test_a_killed_process_does_not_pay_twice(tmp_path: Path) -> None:
    reached, killed = threading.Event(), threading.Event()

    def answering(request: dict[str, Any], number: int) -> Reply:
        if number == ANSWERED:
            reached.set()
            killed.wait(60)
        return completion(request["messages"][1]["content"])

    with serving(answering) as stub:
        root = str(Path(__file__).parents[2])
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), root], env=os.environ | stub.environment)
        assert reached.wait(120)
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL
        killed.set()
        assert len(list(tmp_path.rglob("*.json"))) == ANSWERED
        answers = ask_all(tmp_path, stub.environment)
    assert answers == [str(number) for number in range(QUESTIONS)]
    asked = content(stub)
    twice = [str(ANSWERED)]  # under way when the process was killed
    assert sorted(asked) == sorted([*map(str, range(QUESTIONS)), *twice])
