"""An OpenAI-compatible endpoint: where it is, and one request to it.

Address, model and key come from the environment alone. The key is held by the object that sends it and goes nowhere
else: not into `Endpoint`, which is written beside results, and not into messages, even where a server repeats it.
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
"""Names of our own, and not OPENAI_...: text is sent only where somebody said so, and a key only where it belongs."""

_NEVER = {401: "the key is not accepted", 402: "payment is required", 403: "the key may not do this"}
_PASSING = {408, 409, 425, 429}  # and all from 500 on
_SHOWN = 200  # characters of a server's own words in a message
_SECRET = 8  # a shorter "key" is a placeholder, such as "none", and may be a word of an answer


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where questions go, and with which settings.

    Args:
        base_url: as of OpenAI's API, such as ``https://host/v1``.
        model: the name the endpoint knows the model by.
        max_answer_tokens: an answer is cut off after so many.
        timeout_seconds: for one request, from sending to the last byte.
        temperature: 0 is greedy; None leaves it to the endpoint.
        limit_field: the name under which ``max_answer_tokens`` is sent; newer models of OpenAI that reason want
            ``max_completion_tokens`` (and no temperature).
    """

    base_url: str
    model: str
    max_answer_tokens: int = 300
    timeout_seconds: float = 60.0
    temperature: float | None = 0.0
    limit_field: str = "max_tokens"

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            parts.port  # noqa: B018 - checked when it is read
        except ValueError:
            raise UserError(f"{URL} must be an address such as https://host/v1; it cannot be read as one.") from None
        if "@" in self.base_url or parts.query or parts.fragment:  # the address is kept beside results
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
        """Where questions go, for a person to read."""
        return urlsplit(self.base_url).netloc

    @property
    def in_clear(self) -> bool:
        """Whether others on the way could read what is sent: plain http, and not to this machine."""
        parts = urlsplit(self.base_url)
        return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def endpoint_from_environment(
    *, environment: Mapping[str, str] | None = None, **settings: Any
) -> tuple[Endpoint, str | None]:
    """The endpoint that `URL` and `MODEL` name, and the key of `KEY`, None where there is none.

    Args:
        environment: None is the process's.
        settings: the other fields of `Endpoint`.

    Raises:
        UserError: address or model is missing, or one of the three cannot be used; the key is never in the message.
    """
    environment = os.environ if environment is None else environment
    missing = [name for name in (URL, MODEL) if not environment.get(name)]
    if missing:
        raise UserError(
            f"set {' and '.join(missing)} in the environment: the address (https://host/v1) and the model of an "
            f"OpenAI-compatible endpoint, and its key, if it has one, as {KEY}. A local model needs none of these: "
            "--model-folder."
        )
    if environment.get("OPENAI_CUSTOM_HEADERS"):  # the client would send them to any endpoint
        raise UserError("OPENAI_CUSTOM_HEADERS would be sent to the endpoint too; unset it for this command.")
    key = environment.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{KEY} must be printable ASCII without spaces; what is set is not.")
    return Endpoint(base_url=environment[URL], model=environment[MODEL], **settings), key or None


class EndpointModel:
    """Answers by one HTTP request per question, through the `openai` client.

    Raises:
        UserError: the extra ``autointerp`` is not installed.
    """

    def __init__(self, endpoint: Endpoint, key: str | None) -> None:
        try:
            from openai import AsyncOpenAI, DefaultAsyncHttpxClient
        except ImportError:
            raise UserError(
                "asking an endpoint needs openai and tenacity: pip install 'kronsae[autointerp]'."
            ) from None
        self._endpoint, self._key = endpoint, key
        # A server without keys is sent a placeholder, because the client insists on one.
        self._client = AsyncOpenAI(
            api_key=key or "none",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout_seconds,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),  # else the text goes where a server likes
        )
        self._client.organization = self._client.project = None  # of OPENAI_ORG_ID, ...: not for this endpoint

    @property
    def identity(self) -> Mapping[str, Any]:
        endpoint = self._endpoint
        return {
            "kind": "endpoint",
            "base_url": endpoint.base_url,
            "model": endpoint.model,
            endpoint.limit_field: endpoint.max_answer_tokens,
            "temperature": endpoint.temperature,
        }

    @property
    def max_answer_tokens(self) -> int:
        return self._endpoint.max_answer_tokens

    async def close(self) -> None:
        await self._client.close()

    async def answer(self, question: Question) -> Answer:
        import openai

        try:
            async with asyncio.timeout(self._endpoint.timeout_seconds):  # the client's own starts anew at every byte
                completion = await self._client.chat.completions.create(**self._request(question))
        except (TimeoutError, openai.APITimeoutError):
            raise TryAgainError("timeout", perhaps_paid=True) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ is not None else "unknown"
            raise TryAgainError(f"connection ({cause})", perhaps_paid=True) from None
        except openai.APIStatusError as error:
            raise self._as_failure(error) from None
        except (ValueError, RecursionError, openai.OpenAIError):  # a body that is not JSON, or not of this kind
            raise TryAgainError("a body that cannot be read", perhaps_paid=True) from None
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
        }

    def _read(self, completion: Any, question: Question) -> Answer:
        """The text of the first choice; the client does not check what it read against what it promises."""
        choices = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        text = getattr(message, "content", None)
        if not isinstance(text, str):
            raise TryAgainError("a body that is no chat completion", perhaps_paid=True)
        usage = getattr(completion, "usage", None)
        tokens_in, tokens_out = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(
            text=self._without_key(text),
            tokens_in=_count(tokens_in, question.estimated_tokens),
            tokens_out=_count(tokens_out, self._endpoint.max_answer_tokens),
        )

    def _as_failure(self, error: Any) -> Exception:
        status, words = error.status_code, self._words(error)
        if 300 <= status < 400:
            place = json.dumps(self._without_key(error.response.headers.get("location", "nowhere"))[:_SHOWN])
            return UserError(
                f"the endpoint {self._endpoint.host} sends requests on (HTTP {status}, to {place}); text and key go to "
                f"the address that was given and no other. If you trust the new one, set {URL} to it."
            )
        if status == 404:
            return UserError(f"the endpoint {self._endpoint.host} does not know the address or the model: {words}.")
        if status in _NEVER or error.code == "insufficient_quota":
            reason = _NEVER.get(status, "the account's quota is used up")
            return UserError(f"the endpoint {self._endpoint.host} refuses: {reason} (HTTP {status}): {words}.")
        if status in _PASSING or status >= 500:
            return TryAgainError(f"HTTP {status}", retry_after=_retry_after(error.response.headers))
        return RefusedError(f"HTTP {status}: {words}")

    def _words(self, error: Any) -> str:
        """What the server says, short, escaped, without the key."""
        body = error.body if isinstance(error.body, Mapping) else {}
        said = body.get("message", body or error.response.text)
        return json.dumps(self._without_key(str(said))[:_SHOWN])

    def _without_key(self, text: str) -> str:
        secret = self._key is not None and len(self._key) >= _SECRET
        return text.replace(self._key or "", "***") if secret else text


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, given as a number or as a date; None without one, or one of no sense."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):  # a year beyond a C long is the latter
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
