"""An OpenAI-compatible endpoint: its settings, and a model that sends one request per question.

Address, model and key come only from the environment. Only the object that sends requests holds the key. It is not in
`Endpoint`, which is stored with results, and not in messages, even if a server repeats it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from kronsae.chat.question import Answer, Question, RefusedError, TryAgainError
from kronsae.support.errors import UserError

URL, MODEL, KEY = "KRONSAE_CHAT_URL", "KRONSAE_CHAT_MODEL", "KRONSAE_CHAT_KEY"
"""Not OPENAI_...: text is sent only where the user explicitly said so, and the key only to its own endpoint."""

_NEVER = {401: "the key is not accepted", 402: "payment is required", 403: "the key has no permission"}
_PASSING = {408, 409, 425, 429}  # and all from 500 on
_SHOWN = 200  # characters of a server's text quoted in a message
_SECRET = 8  # a shorter key is a placeholder, such as "none", and may occur as a word in an answer


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address and settings of an endpoint.

    Args:
        base_url: base address as for OpenAI's API, such as ``https://host/v1``.
        model: name of the model at the endpoint.
        max_answer_tokens: largest length of an answer; longer ones are cut off.
        timeout_seconds: time limit of one request, from sending to the last byte.
        temperature: 0 is greedy; None: the endpoint's default.
        limit_field: field that sends ``max_answer_tokens``. OpenAI's newer reasoning models require
            ``max_completion_tokens`` (and no temperature).
        structured: send the answer's JSON schema as ``response_format``, which servers such as vLLM and llama.cpp
            enforce.
    """

    base_url: str
    model: str
    max_answer_tokens: int = 300
    timeout_seconds: float = 60.0
    temperature: float | None = 0.0
    limit_field: str = "max_tokens"
    structured: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            parts.port  # noqa: B018 - checked when it is read
        except ValueError:
            raise UserError(f"{URL} must be an address such as https://host/v1; it cannot be read as one.") from None
        if "@" in self.base_url or parts.query or parts.fragment:  # the address is stored with results
            raise UserError(f"{URL} must hold no user, password or query; give the key as {KEY}.")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{URL} must be an address such as https://host/v1; got {self.base_url!r}.")
        if not self.model:
            raise UserError(f"{MODEL} must name a model; got ''.")
        if self.max_answer_tokens < 1:
            raise UserError(f"max_answer_tokens must be at least 1; got {self.max_answer_tokens!r}.")
        if not 0 < self.timeout_seconds < math.inf:
            raise UserError(f"timeout_seconds must be above 0 and finite; got {self.timeout_seconds!r}.")
        if self.limit_field not in ("max_tokens", "max_completion_tokens"):
            raise UserError(f"limit_field must be max_tokens or max_completion_tokens; got {self.limit_field!r}.")

    @property
    def host(self) -> str:
        """Host and port of the address, for messages."""
        return urlsplit(self.base_url).netloc

    @property
    def in_clear(self) -> bool:
        """Whether requests can be read in transit: plain http to another machine."""
        parts = urlsplit(self.base_url)
        return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def endpoint_from_environment(
    *, environment: Mapping[str, str] | None = None, **settings: Any
) -> tuple[Endpoint, str | None]:
    """Return the endpoint named by `URL` and `MODEL`, and the key from `KEY`; None if no key is set.

    Args:
        environment: variables; None: those of the process.
        settings: the other fields of `Endpoint`.

    Raises:
        UserError: address or model is missing, or one of the three is invalid; the message never holds the key.
    """
    environment = os.environ if environment is None else environment
    missing = [name for name in (URL, MODEL) if not environment.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be set in the environment: the address (https://host/v1) and the model of "
            f"an OpenAI-compatible endpoint; if it has a key, set {KEY} too. A local model needs none of these: "
            "--model-folder."
        )
    if environment.get("OPENAI_CUSTOM_HEADERS"):  # the client would send them to any endpoint
        raise UserError("OPENAI_CUSTOM_HEADERS must not be set: it would be sent to the endpoint. Unset it.")
    key = environment.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{KEY} must be printable ASCII without spaces; the value set is not.")
    return Endpoint(base_url=environment[URL], model=environment[MODEL], **settings), key or None


class EndpointModel:
    """Model behind an endpoint: one HTTP request per question, through the `openai` client.

    Raises:
        UserError: the extra ``autointerp`` is not installed.
    """

    def __init__(self, endpoint: Endpoint, key: str | None) -> None:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError:
            raise UserError(
                "asking an endpoint needs openai and tenacity. Install them with: pip install 'kronsae[autointerp]'"
            ) from None
        self._endpoint, self._key = endpoint, key
        # Without a key a placeholder is sent, because the client requires one.
        self._client = AsyncOpenAI(
            api_key=key or "none",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_seconds,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),  # else a server could redirect the text
        )
        self._client.organization = self._client.project = None  # from OPENAI_ORG_ID, ...: not for this endpoint

    @property
    def identity(self) -> Mapping[str, Any]:
        endpoint = self._endpoint
        return {
            "kind": "endpoint",
            "base_url": endpoint.base_url,
            "model": endpoint.model,
            endpoint.limit_field: endpoint.max_answer_tokens,
            "temperature": endpoint.temperature,
            **({"structured": True} if endpoint.structured else {}),
        }

    @property
    def max_answer_tokens(self) -> int:
        return self._endpoint.max_answer_tokens

    async def close(self) -> None:
        await self._client.close()

    async def answer(self, question: Question) -> Answer:
        import openai

        try:
            async with asyncio.timeout(self._endpoint.timeout_seconds):  # the client's timeout restarts at every byte
                completion = await self._client.chat.completions.create(**self._request(question))
        except (TimeoutError, openai.APITimeoutError):
            raise TryAgainError("timeout", perhaps_paid=True) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ is not None else "unknown"
            raise TryAgainError(f"connection ({cause})", perhaps_paid=True) from None
        except openai.APIStatusError as error:
            raise self._to_failure(error) from None
        except (ValueError, RecursionError, openai.OpenAIError):  # the body is not JSON, or not a completion
            raise TryAgainError("an unreadable body", perhaps_paid=True) from None
        return self._read(completion, question)

    def _request(self, question: Question) -> dict[str, Any]:
        endpoint = self._endpoint
        messages = [
            {"role": "system", "content": question.instructions},
            {"role": "user", "content": question.content},
        ]
        temperature = {} if endpoint.temperature is None else {"temperature": endpoint.temperature}
        return {
            "model": endpoint.model,
            "messages": messages,
            endpoint.limit_field: endpoint.max_answer_tokens,
            **temperature,
            **self._form(question),
        }

    def _form(self, question: Question) -> dict[str, Any]:
        if not self._endpoint.structured or question.schema is None:
            return {}
        schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}

    def _read(self, completion: Any, question: Question) -> Answer:
        """Return the text of the first choice; the client does not check the types of what it read."""
        choices = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        text = getattr(message, "content", None)
        if not isinstance(text, str):
            raise TryAgainError("a body that is not a chat completion", perhaps_paid=True)
        usage = getattr(completion, "usage", None)
        tokens_in, tokens_out = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(
            text=self._without_key(text),
            tokens_in=_count(tokens_in, question.estimated_tokens),
            tokens_out=_count(tokens_out, self._endpoint.max_answer_tokens),
        )

    def _to_failure(self, error: Any) -> Exception:
        status, words = error.status_code, self._server_text(error)
        if 300 <= status < 400:
            place = json.dumps(self._without_key(error.response.headers.get("location", "nowhere"))[:_SHOWN])
            return UserError(
                f"the endpoint {self._endpoint.host} redirects requests (HTTP {status}, to {place}); text and key are "
                f"sent only to the given address. If you trust the new one, set {URL} to it."
            )
        if status == 404:
            return UserError(f"the endpoint {self._endpoint.host} does not know the address or the model: {words}.")
        if status in _NEVER or error.code == "insufficient_quota":
            reason = _NEVER.get(status, "the account's quota is used up")
            return UserError(f"the endpoint {self._endpoint.host} refuses: {reason} (HTTP {status}): {words}.")
        if status in _PASSING or status >= 500:
            return TryAgainError(f"HTTP {status}", retry_after=_retry_after(error.response.headers))
        return RefusedError(f"HTTP {status}: {words}")

    def _server_text(self, error: Any) -> str:
        """Return the server's message: shortened, escaped, without the key."""
        body = error.body if isinstance(error.body, Mapping) else {}
        said = body.get("message", body or error.response.text)
        return json.dumps(self._without_key(str(said))[:_SHOWN])

    def _without_key(self, text: str) -> str:
        secret = self._key is not None and len(self._key) >= _SECRET
        return text.replace(self._key or "", "***") if secret else text


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None if it is missing or invalid."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):  # OverflowError: a year beyond a C long
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _count(value: object, otherwise: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    return otherwise


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
