"""Sends one streamed request to an OpenAI-compatible server and times it.

| measure | from | to |
|---|---|---|
| `ttft` | the request is sent | the first event with text |
| `itl` | an event with text | the next one; one value for each event, as in vLLM's `bench serve` |
| `latency` | the request is sent | the last event |
| `queued` | the request is due | it is sent: it waits while `max_concurrency` are running |

A server may put several tokens into one event, so the number of tokens is taken from `usage`. If
the server sends no `usage`, events are counted instead and the result says so.

Streams are read with aiohttp, whose cost for each event is a fraction of httpx2's: the load
generator shares the machine with the server that it measures. One-off calls use httpx2.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import httpx2

from muxjax.errors import BenchError

Backend = Literal["openai", "openai-chat"]
ENDPOINTS: dict[Backend, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_KEEPALIVE_S = 4.0
"""Idle seconds after which a connection is closed; Uvicorn closes its end after 5."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
      url: its address, for example http://127.0.0.1:8000.
      backend: completions or chat.
      endpoint: path of the API; by default OpenAI's path for the backend.
      headers: sent with every request.
      body: added to every request's JSON: sampling parameters, `ignore_eos`, ...
      timeout: seconds without data after which a request fails.
      verify: False accepts any TLS certificate.

    Raises:
      BenchError: `url` is not an HTTP address.
    """

    url: str
    backend: Backend = "openai"
    endpoint: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    verify: bool = True

    def __post_init__(self) -> None:
        try:
            parsed = httpx2.URL(self.url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise BenchError(f"{self.url!r} is not an address: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise BenchError(f"an address is written http://HOST:PORT, not {self.url!r}")

    @property
    def base(self) -> str:
        """The address without the trailing `/v1`, which is optional in `url`."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def api(self) -> str:
        """The URL that requests are sent to."""
        return self.base + (self.endpoint or ENDPOINTS[self.backend])

    def session(self) -> aiohttp.ClientSession:
        """A client session with an unlimited number of connections; needs a running event loop."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=bool(self.verify)
            ),
            headers={"Content-Type": "application/json", **self.headers},
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self.timeout, sock_read=self.timeout
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,
        )


@dataclass(frozen=True)
class RequestInput:
    """One request to send.

    Attributes:
      model: its name at the server.
      prompt: text, or token ids (completions only).
      prompt_tokens: intended length of the prompt.
      output_tokens: maximum number of tokens to generate.
      arrival: due time in seconds from the start of the run.
    """

    model: str
    prompt: str | tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    arrival: float = 0.0


@dataclass
class RequestResult:
    """The measurements of one request. Times are in seconds from the start of the run.

    Attributes:
      request: the input.
      sent: when it was sent; None if it was not sent.
      first: when the first text arrived.
      end: when the last event arrived.
      itl: seconds between events with text.
      prompt_tokens: the server's count, or else the intended length.
      output_tokens: the server's count, or else the number of events with text.
      counted: whether the server reported the number of tokens.
      text: the generated text.
      finish_reason: as the server reported it.
      error: the error message; empty on success.
    """

    request: RequestInput
    sent: float | None = None
    first: float | None = None
    end: float | None = None
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    text: str = ""
    finish_reason: str | None = None
    error: str = ""

    @property
    def success(self) -> bool:
        return not self.error and self.end is not None

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds; 0 without a token."""
        if self.sent is None or self.first is None:
            return 0.0
        return self.first - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending to the last event; 0 without an event."""
        if self.sent is None or self.end is None:
            return 0.0
        return self.end - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first, in seconds; 0 with fewer than two tokens."""
        if self.output_tokens < 2:
            return 0.0
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def queued(self) -> float:
        """Seconds that the request waited in the client."""
        return 0.0 if self.sent is None else max(0.0, self.sent - self.request.arrival)


def request_body(server: Server, request: RequestInput) -> dict[str, Any]:
    """The JSON body of a request.

    Raises:
      BenchError: token ids for a chat.
    """
    body: dict[str, Any] = {
        "model": request.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.backend == "openai":
        prompt = request.prompt
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        body["max_tokens"] = request.output_tokens
    else:
        if not isinstance(request.prompt, str):
            raise BenchError("a chat request needs text, not token ids")
        body["messages"] = [{"role": "user", "content": request.prompt}]
        body["max_completion_tokens"] = request.output_tokens
    return {**body, **server.body}


async def send_request(
    session: aiohttp.ClientSession, server: Server, request: RequestInput, start: float
) -> RequestResult:
    """Sends a request now and reads its stream. Failures are returned; only cancellation raises.

    Args:
      session: from `server.session()`.
      server: the server.
      request: the request; its `arrival` is ignored.
      start: start of the run on `time.perf_counter`'s clock.
    """
    result = RequestResult(request, prompt_tokens=request.prompt_tokens)
    body = json.dumps(request_body(server, request)).encode()
    result.sent = time.perf_counter() - start
    try:
        async with session.post(server.api, data=body, allow_redirects=False) as response:
            if response.status != 200:
                text = (await response.read()).decode(errors="replace")
                result.error = f"HTTP {response.status}: {_error_message(text)}"
                return result
            await _read_stream(response, result, start)
    except (aiohttp.ClientError, TimeoutError) as error:
        result.error = f"{type(error).__name__}: {error}"
    except ValueError as error:  # an event that is not JSON
        result.error = f"the server sent an invalid event: {error}"
    return result


async def _read_stream(
    response: aiohttp.ClientResponse, result: RequestResult, start: float
) -> None:
    events = 0
    done = False
    started: float | None = None
    latest = 0.0
    texts: list[str] = []
    try:
        async for data in _events(response):
            now = time.perf_counter() - start
            if data == b"[DONE]":
                done = True
                break
            event = json.loads(data)
            if "error" in event:
                result.error = _error_message(data.decode(errors="replace"))
                return
            usage = event.get("usage")
            if usage:
                result.prompt_tokens = usage.get("prompt_tokens") or result.prompt_tokens
                if usage.get("completion_tokens") is not None:
                    result.output_tokens = usage["completion_tokens"]
                    result.counted = True
            choices = event.get("choices")
            if not choices:
                continue
            choice = choices[0]
            result.finish_reason = choice.get("finish_reason") or result.finish_reason
            started = now if started is None else started
            result.end = now
            text = _choice_text(choice)
            if text:
                events += 1
                texts.append(text)
                if result.first is None:
                    result.first = now
                else:
                    result.itl.append(now - latest)
                latest = now
    finally:
        result.text = "".join(texts)
    if result.end is None or not (done or result.finish_reason):
        result.error = "the stream ended before the response was complete"
        return
    if result.first is None:  # tokens without text
        result.first = started
    if not result.counted:
        result.output_tokens = events


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each, as in OpenAI's API."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _choice_text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return reasoning + (delta.get("content") or "")


def _error_message(text: str) -> str:
    """The message of a JSON error, or the beginning of any other text."""
    try:
        content = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    error = content.get("error", content) if isinstance(content, dict) else content
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or text)[:300]


def list_models(server: Server) -> list[str]:
    """The names of the server's models.

    Raises:
      BenchError: the server does not answer, or has no list of models.
    """
    url = f"{server.base}/v1/models"
    try:
        response = httpx2.get(
            url,
            headers=dict(server.headers),
            timeout=min(30.0, server.timeout),
            verify=server.verify,
        )
    except httpx2.HTTPError as error:
        raise BenchError(
            f"cannot reach {url}: {type(error).__name__}: {error}; is the server running?"
        ) from error
    try:
        names = [entry["id"] for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"{url} returned no list of models (HTTP {response.status_code}); name them with "
            f"--model"
        ) from error
    if not names:
        raise BenchError(f"{url}: the server has no models")
    return names
