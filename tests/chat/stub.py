"""An OpenAI-compatible server on loopback with configurable replies and failures."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-of-the-tests-0123456789"


@dataclass(frozen=True)
class Reply:
    """A reply with status, headers and body; ``cut`` closes the connection after that many bytes of the body."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def completion(text: str, *, usage: tuple[int, int] | None = (100, 10)) -> Reply:
    """Return a chat completion with this text."""
    body: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Reply(body=json.dumps(body), headers={"Content-Type": "application/json"})


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    """Return an error in OpenAI's format."""
    body = json.dumps({"error": {"message": message, "type": "x", "code": None}})
    return Reply(status, body, {"Content-Type": "application/json", **headers})


Answering = Callable[[dict[str, Any], int], Reply]
"""From a request's JSON and its number (from 0 on) to the reply."""


class Stub:
    """The requests received, the maximum number of concurrent ones, and the replies."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.url = ""
        self._lock = threading.Lock()
        self._now = 0

    @property
    def environment(self) -> dict[str, str]:
        return {"KRONSAE_CHAT_URL": self.url, "KRONSAE_CHAT_MODEL": "stub", "KRONSAE_CHAT_KEY": KEY}

    def reply(self, headers: dict[str, str], request: dict[str, Any]) -> Reply:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            if headers.get("authorization") != f"Bearer {KEY}":
                return failure(401, f"Incorrect API key provided: {headers.get('authorization')}")
            return self.answering(request, number)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(answering: Answering) -> Iterator[Stub]:
    """Yield a server on a free loopback port."""
    stub = Stub(answering)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(size))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = stub.reply(headers, request)
            body = reply.body.encode()
            try:
                if reply.status == 0:  # close without a word
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body if reply.cut is None else body[: reply.cut])
            except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                pass

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sensible(request: dict[str, Any], number: int = 0) -> Reply:
    """Answers as a good model would: ``fox`` is what every latent is about, and judgements look for it.

    Detection: 1 where the text holds ``fox``. Fuzzing: 1 where every highlighted token holds it.
    """
    instructions, content = (message["content"] for message in request["messages"])
    document = json.loads(content)
    if "explanation" not in document:
        return completion(json.dumps({"explanation": "the word fox"}))
    fuzzing = "some tokens are highlighted" in instructions
    judged = []
    for excerpt in document["excerpts"]:
        marked = [token for segment in excerpt if isinstance(segment, list) for token in segment]
        text = "".join(segment if isinstance(segment, str) else "".join(segment) for segment in excerpt)
        judged.append(int(all("fox" in token for token in marked) if fuzzing else bool(re.search("fox", text))))
    return completion(json.dumps(judged))
