"""Test the endpoint over HTTP on loopback."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.chat.stub import KEY, Answering, Reply, Stub, completion, failure, serving

from kronsae.chat import AnswerMemory, Asker, AskReport, Bounds, RateLimiter, RetrySettings, Usage
from kronsae.chat.endpoint import Endpoint, EndpointModel, endpoint_from_environment
from kronsae.support.errors import UserError

RETRY = RetrySettings(concurrency=4, attempts=3, backoff_seconds=0.001)


class Slept:
    """Record the requested waiting times instead of waiting."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


class Outcome:
    """Outcome of several questions."""

    def __init__(self) -> None:
        self.answers: list[str | None] = []
        self.report = AskReport()
        self.spent = Usage()
        self.slept = Slept()
        self.error: UserError | None = None


def ask(
    stub: Stub,
    folder: Path,
    contents: Sequence[str] = ("hello",),
    *,
    schema: dict[str, Any] | None = None,
    key: str | None = KEY,
    bounds: Bounds | None = None,
    retry: RetrySettings = RETRY,
    **settings: Any,
) -> Outcome:
    """Ask all questions concurrently; waiting times are only recorded."""
    environment = {**stub.environment, "KRONSAE_CHAT_KEY": key or ""}
    endpoint, found = endpoint_from_environment(environment=environment, **{"timeout_seconds": 5.0, **settings})
    outcome = Outcome()

    async def run() -> None:
        now = 0.0

        async def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            await outcome.slept(seconds)

        asker = Asker(
            EndpointModel(endpoint, found),
            AnswerMemory(folder),
            bounds=Bounds() if bounds is None else bounds,
            rate_limiter=RateLimiter(clock=lambda: now, sleep=sleep),
            retry=retry,
            sleep=sleep,
        )
        try:
            outcome.answers = list(await asyncio.gather(*(asker("Be brief.", content, schema) for content in contents)))
        except UserError as error:
            outcome.error = error
        finally:
            await asker.close()
        outcome.report, outcome.spent = asker.report, asker.spent

    asyncio.run(run())
    return outcome


def first(*replies: Reply) -> Answering:
    """Return these replies, followed by valid ones."""
    return lambda request, number: replies[number] if number < len(replies) else completion("fine")


def test_a_good_answer(tmp_path: Path) -> None:
    with serving(first()) as stub:
        outcome = ask(stub, tmp_path, max_answer_tokens=7)
    assert outcome.answers == ["fine"]
    assert outcome.spent == Usage(requests=1, tokens_in=100, tokens_out=10)
    [request] = stub.requests
    assert request == {
        "model": "stub",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "max_tokens": 7,
        "temperature": 0.0,
    }
    assert stub.headers[0]["authorization"] == f"Bearer {KEY}"


def test_structured_answers_send_the_schema_and_are_answers_of_their_own(tmp_path: Path) -> None:
    schema = {"type": "array"}
    with serving(first()) as stub:
        ask(stub, tmp_path, schema=schema)
        ask(stub, tmp_path)  # known: the schema follows from the messages
        ask(stub, tmp_path, schema=schema, structured=True)
        ask(stub, tmp_path / "other", structured=True)
    sent = [request.get("response_format") for request in stub.requests]
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert sent == [None, form, None]


def test_models_that_reason_get_other_settings(tmp_path: Path) -> None:
    with serving(first()) as stub:
        ask(stub, tmp_path, limit_field="max_completion_tokens", temperature=None)
    assert set(stub.requests[0]) == {"model", "messages", "max_completion_tokens"}


def test_usage_that_is_not_told_is_estimated(tmp_path: Path) -> None:
    with serving(lambda request, number: completion("fine", usage=None)) as stub:
        outcome = ask(stub, tmp_path, max_answer_tokens=50)
    assert outcome.spent == Usage(requests=1, tokens_in=20 + 5, tokens_out=50)  # 9 + 5 bytes are 5 tokens


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (failure(500), "HTTP 500"),
        (failure(503), "HTTP 503"),
        (failure(429), "HTTP 429"),
        (failure(408), "HTTP 408"),
        (Reply(0), "connection (RemoteProtocolError)"),
        (Reply(200, completion("fine").body, {"Content-Type": "application/json"}, cut=30), "connection"),
        (Reply(200, completion("fine").body[:40], {"Content-Type": "application/json"}), "an unreadable body"),
        (Reply(200, "<html>busy</html>", {"Content-Type": "text/html"}), "a body that is not a chat completion"),
        (Reply(200, "[]", {"Content-Type": "application/json"}), "a body that is not a chat completion"),
        (Reply(200, '{"choices": []}', {"Content-Type": "application/json"}), "a body that is not a chat completion"),
        (Reply(200, '{"choices": [7]}', {"Content-Type": "application/json"}), "a body that is not a chat completion"),
        (Reply(200, "[" * 100_000, {"Content-Type": "application/json"}), "an unreadable body"),
        (completion(None), "a body that is not a chat completion"),  # type: ignore[arg-type]
    ],
)
def test_a_failure_that_may_pass_is_tried_again(bad: Reply, reason: str, tmp_path: Path) -> None:
    with serving(first(bad, bad)) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["fine"]
    assert len(stub.requests) == 3
    [(told, times)] = outcome.report.failed_attempts.items()
    assert told.startswith(reason)
    assert times == 2
    assert outcome.spent.requests == 3
    assert outcome.report.unanswered == {}


def test_attempts_end(tmp_path: Path) -> None:
    with serving(lambda request, number: failure(500)) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == [None]
    assert len(stub.requests) == RETRY.attempts
    assert outcome.report.unanswered == {"HTTP 500": 1}
    assert not any(tmp_path.rglob("*.json"))


def test_too_many_failures_in_a_row_end_the_work(tmp_path: Path) -> None:
    with serving(lambda request, number: failure(500)) as stub:
        outcome = ask(stub, tmp_path, [str(i) for i in range(30)])
        assert len(stub.requests) <= (RETRY.give_up_after + RETRY.concurrency) * RETRY.attempts
    assert "the language model must answer; 5 questions in a row had no answer (the last: HTTP 500)" in str(
        outcome.error
    )


def test_an_answer_between_failures_is_no_row(tmp_path: Path) -> None:
    with serving(lambda request, number: failure(500) if number % 2 else completion("fine")) as stub:
        one_at_a_time = RetrySettings(concurrency=1, attempts=1, give_up_after=2)
        outcome = ask(stub, tmp_path, [str(i) for i in range(6)], retry=one_at_a_time)
    assert outcome.answers == ["fine", None] * 3


def test_retry_after_in_seconds_is_kept_to(tmp_path: Path) -> None:
    with serving(first(failure(429, Retry_After="17"))) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["fine"]
    assert max(outcome.slept.seconds) == pytest.approx(17, abs=0.1)


def test_retry_after_as_a_date_is_kept_to(tmp_path: Path) -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    with serving(first(failure(503, Retry_After=date))) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["fine"]
    assert 25 < max(outcome.slept.seconds) < 31


@pytest.mark.parametrize("value", ["soon", "nan", "-5", "", f"Mon, 1 Jan {10**20} 00:00:00 GMT"])
def test_a_retry_after_of_no_sense_is_no_wait(value: str, tmp_path: Path) -> None:
    with serving(first(failure(429, Retry_After=value))) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["fine"]
    assert max(outcome.slept.seconds) < 1


def test_a_server_that_asks_for_hours_ends_the_work(tmp_path: Path) -> None:
    with serving(first(failure(429, Retry_After="7200"))) as stub:
        outcome = ask(stub, tmp_path)
    assert "asks for a wait of 7200 s (HTTP 429), longer than max_wait_seconds=120" in str(outcome.error)
    assert len(stub.requests) == 1


def test_a_slow_server_is_given_up_and_counted_as_paid(tmp_path: Path) -> None:
    def slow(request: dict[str, Any], number: int) -> Reply:
        time.sleep(0.5 if number == 0 else 0)
        return completion("fine")

    with serving(slow) as stub:
        outcome = ask(stub, tmp_path, timeout_seconds=0.2, max_answer_tokens=40)
    assert outcome.answers == ["fine"]
    assert outcome.report.failed_attempts == {"timeout": 1}
    assert outcome.spent == Usage(requests=2, tokens_in=25 + 100, tokens_out=40 + 10)


def test_a_question_that_is_refused_is_not_asked_again(tmp_path: Path) -> None:
    with serving(first(failure(400, "content filter"))) as stub:
        outcome = ask(stub, tmp_path)
        assert len(stub.requests) == 1
    assert outcome.answers == [None]
    assert outcome.report.unanswered == {'HTTP 400: "content filter"': 1}


@pytest.mark.parametrize(
    ("status", "told"),
    [(403, "refuses: the key has no permission"), (402, "payment is required"), (404, "does not know the address")],
)
def test_what_never_works_ends_the_work_at_once(status: int, told: str, tmp_path: Path) -> None:
    with serving(lambda request, number: failure(status)) as stub:
        outcome = ask(stub, tmp_path)
        assert len(stub.requests) == 1
    assert told in str(outcome.error)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_nothing_is_sent_on(status: int, tmp_path: Path) -> None:
    """Not to another host, and not to another address of the same one: the environment says where text may go."""
    with serving(first()) as other:
        for place in (f"{other.url}/chat/completions?key={KEY}", "/elsewhere"):
            sent_on = Reply(status, "", {"Location": place})
            with serving(lambda request, number, reply=sent_on: reply) as stub:  # type: ignore[misc]
                outcome = ask(stub, tmp_path)
                assert len(stub.requests) == 1
            assert f"redirects requests (HTTP {status}, to " in str(outcome.error)
            assert place.split("?")[0] in str(outcome.error)
            assert "set KRONSAE_CHAT_URL to it" in str(outcome.error)
            assert KEY not in str(outcome.error)
        assert other.requests == []
        assert other.headers == []


def test_a_used_up_quota_is_not_waited_for(tmp_path: Path) -> None:
    body = '{"error": {"message": "quota", "code": "insufficient_quota"}}'
    with serving(first(Reply(429, body, {"Content-Type": "application/json"}))) as stub:
        outcome = ask(stub, tmp_path)
    assert "the account's quota is used up (HTTP 429)" in str(outcome.error)


def test_a_wrong_key_is_told_and_not_repeated(tmp_path: Path) -> None:
    wrong = "sk-wrong-9876543210"
    with serving(first()) as stub:
        outcome = ask(stub, tmp_path, key=wrong)
        assert len(stub.requests) == 1
    assert "refuses: the key is not accepted (HTTP 401)" in str(outcome.error)
    assert wrong not in str(outcome.error)
    assert "***" in str(outcome.error)  # the server's words, which held the key


def test_the_key_is_written_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    replies = (failure(500, KEY), completion(f"your key is {KEY}"))
    with serving(first(*replies)) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["your key is ***"]
    assert any(tmp_path.rglob("*.json"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY in path.read_text("utf-8")]
    assert KEY not in caplog.text
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


def test_what_belongs_to_openai_is_not_sent_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "openais-own-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/")
    with serving(first()) as stub:
        outcome = ask(stub, tmp_path)
    assert outcome.answers == ["fine"]
    assert "openais-own-secret" not in str(stub.headers)


def test_no_more_at_once_than_allowed(tmp_path: Path) -> None:
    def slow(request: dict[str, Any], number: int) -> Reply:
        time.sleep(0.02)
        return completion("fine")

    with serving(slow) as stub:
        outcome = ask(stub, tmp_path, [str(i) for i in range(12)])
    assert outcome.answers == ["fine"] * 12
    assert 2 <= stub.most_at_once <= RETRY.concurrency


def test_an_answer_is_asked_for_once_in_a_lifetime(tmp_path: Path) -> None:
    with serving(first()) as stub:
        ask(stub, tmp_path, ["a", "b"])
        again = ask(stub, tmp_path, ["b", "a", "c"])
        assert len(stub.requests) == 3
        assert again.report.remembered == 2
        other = ask(stub, tmp_path, ["a"], max_answer_tokens=99)  # another setting is another question
        assert other.report.remembered == 0
        assert len(stub.requests) == 4


def test_a_damaged_answer_is_asked_for_anew(tmp_path: Path) -> None:
    with serving(first()) as stub:
        ask(stub, tmp_path)
        [path] = tmp_path.rglob("*.json")
        for damage in ("{", "[]", '{"answer": {"text": 3}}'):
            path.write_text(damage, "utf-8")
            assert ask(stub, tmp_path).answers == ["fine"]
        assert len(stub.requests) == 4


def test_a_bound_stops_the_work_and_keeps_what_was_paid(tmp_path: Path) -> None:
    with serving(first()) as stub:
        outcome = ask(stub, tmp_path, [str(i) for i in range(20)], bounds=Bounds(max_requests=6))
        assert len(stub.requests) == 6
    assert "would exceed max_requests=6 (7 requests)" in str(outcome.error)
    assert len(list(tmp_path.rglob("*.json"))) == 6


def test_repeated_requests_count_against_the_bound(tmp_path: Path) -> None:
    with serving(lambda request, number: failure(500)) as stub:
        outcome = ask(stub, tmp_path, bounds=Bounds(max_requests=2))
        assert len(stub.requests) == 2
    assert "max_requests=2" in str(outcome.error)


def test_requests_under_way_when_stopped_are_kept(tmp_path: Path) -> None:
    """One question ends the work at once; the answers to the slower ones are paid for, and come."""

    def mixed(request: dict[str, Any], number: int) -> Reply:
        if request["messages"][1]["content"] == "bad":
            time.sleep(0.1)
            return failure(403)
        time.sleep(0.3)
        return completion("fine")

    with serving(mixed) as stub:
        endpoint, key = endpoint_from_environment(environment=stub.environment)
        memory = AnswerMemory(tmp_path)

        async def run() -> None:
            model = EndpointModel(endpoint, key)
            asker = Asker(model, memory, bounds=Bounds(), rate_limiter=RateLimiter(), retry=RETRY)
            try:
                async with asyncio.TaskGroup() as group:
                    for content in ("a", "b", "bad"):
                        group.create_task(asker("x", content))
            finally:
                await asker.close()

        with pytest.raises(ExceptionGroup):
            asyncio.run(run())
    assert len(list(tmp_path.rglob("*.json"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"KRONSAE_CHAT_URL": ""}, "KRONSAE_CHAT_URL must be set in the environment"),
        ({"KRONSAE_CHAT_MODEL": ""}, "KRONSAE_CHAT_MODEL must be set in the environment"),
        ({"KRONSAE_CHAT_URL": "ftp://host/v1"}, "must be an address such as https://host/v1"),
        ({"KRONSAE_CHAT_URL": "http://[::1"}, "cannot be read as one"),
        ({"KRONSAE_CHAT_URL": "https://me:word@host/v1"}, "must hold no user, password or query"),
        ({"KRONSAE_CHAT_URL": "https://host/v1?key=abc"}, "must hold no user, password or query"),
        ({"KRONSAE_CHAT_KEY": "two words"}, "KRONSAE_CHAT_KEY must be printable ASCII without spaces"),
        ({"OPENAI_CUSTOM_HEADERS": "X: y"}, "OPENAI_CUSTOM_HEADERS must not be set: it would be sent to the endpoint"),
    ],
)
def test_an_environment_that_cannot_be_used(changes: dict[str, str], message: str) -> None:
    good = {"KRONSAE_CHAT_URL": "https://host/v1", "KRONSAE_CHAT_MODEL": "m", "KRONSAE_CHAT_KEY": KEY}
    with pytest.raises(UserError, match=message) as caught:
        endpoint_from_environment(environment=good | changes)
    assert not any(value and value in str(caught.value) for value in ("two words", "word@", "abc"))


def test_a_key_with_a_newline_after_it_is_taken() -> None:
    _, key = endpoint_from_environment(
        environment={"KRONSAE_CHAT_URL": "https://host/v1", "KRONSAE_CHAT_MODEL": "m", "KRONSAE_CHAT_KEY": f"{KEY}\n"}
    )
    assert key == KEY


@pytest.mark.parametrize(
    ("url", "in_clear"),
    [
        ("http://127.0.0.1:8000/v1", False),
        ("http://localhost/v1", False),
        ("http://[::1]:80/v1", False),
        ("https://example.org/v1", False),
        ("http://example.org/v1", True),
        ("http://10.0.0.7/v1", True),
    ],
)
def test_who_could_listen(url: str, in_clear: bool) -> None:
    assert Endpoint(base_url=url, model="m").in_clear is in_clear


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "KRONSAE_CHAT_MODEL must name a model"),
        ({"max_answer_tokens": 0}, "max_answer_tokens must be at least 1; got 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds must be above 0 and finite; got inf"),
        ({"limit_field": "limit"}, "limit_field must be max_tokens or max_completion_tokens; got 'limit'"),
    ],
)
def test_an_endpoint_that_makes_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Endpoint(**{"base_url": "https://host/v1", "model": "m", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1; got 0"),
        ({"backoff_seconds": 0.0}, "backoff_seconds must be above 0 and finite; got 0.0"),
    ],
)
def test_a_persistence_that_makes_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetrySettings(**values)
