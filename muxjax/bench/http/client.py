"""One request to an OpenAI-compatible server, streamed and timed.

What is timed, and from where:

| what | from | to |
|---|---|---|
| `ttft` | the request is sent | the first event that brings text |
| `itl` | an event with text | the next one; one for each event, as in vLLM's `bench serve` |
| `latency` | the request is sent | the last event |
| `queued` | the request is due | it is sent: it waits where `max_concurrency` are under way |

A server may put several tokens into one event, so the number of tokens is what the server says it
is (`usage`), not the number of events; where it says nothing, events are counted and the outcome
says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from muxjax.errors import BenchError

Backend = Literal["openai", "openai-chat"]
ENDPOINTS: dict[Backend, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
      url: where it is, as http://127.0.0.1:8000.
      backend: completions, or chat.
      endpoint: path of the API; by default OpenAI's for the backend.
      headers: sent with every request.
      body: added to every request's JSON: sampling settings, `ignore_eos`, ...
      timeout: seconds that nothing may come for.
      verify: False takes any certificate.

    Raises:
      BenchError: an address that is none.
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
            parsed = httpx.URL(self.url)
        except (httpx.InvalidURL, TypeError) as error:
            raise BenchError(f"{self.url!r} is not an address: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise BenchError(f"an address is written http://HOST:PORT, not {self.url!r}")

    @property
    def base(self) -> str:
        """The address without the API's version, which clients write or leave out."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def api(self) -> str:
        """Where requests go."""
        return self.base + (self.endpoint or ENDPOINTS[self.backend])

    def client(self) -> httpx.AsyncClient:
        """A client with as many connections as there are requests."""
        return httpx.AsyncClient(
            headers=dict(self.headers),
            timeout=httpx.Timeout(self.timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=self.verify,
        )


@dataclass(frozen=True)
class RequestInput:
    """One request to be made.

    Attributes:
      model: its name at the server.
      prompt: a text, or token ids (completions only).
      prompt_tokens: how long it is meant to be.
      output_tokens: the most tokens to make.
      arrival: when it is due, in seconds from the start.
    """

    model: str
    prompt: str | tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    arrival: float = 0.0


@dataclass
class RequestResult:
    """What became of a request. Times are in seconds from the run's start.

    Attributes:
      ask: what was asked.
      sent: when it was sent; None if it never was.
      first: when the first text came.
      end: when the last event came.
      itl: seconds between events with text.
      prompt_tokens: as the server counts them; else as meant.
      output_tokens: as the server counts them; else the events with text.
      counted: whether the server said how many tokens there were.
      text: what was made.
      finish_reason: why it ended, as the server says.
      error: what went wrong; empty if nothing did.
    """

    ask: RequestInput
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
        """Seconds to the first token; 0 if there was none."""
        if self.sent is None or self.first is None:
            return 0.0
        return self.first - self.sent

    @property
    def latency(self) -> float:
        """Seconds from sending to the last event; 0 if there was none."""
        if self.sent is None or self.end is None:
            return 0.0
        return self.end - self.sent

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first; 0 where there is no second one."""
        if self.output_tokens < 2:
            return 0.0
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def queued(self) -> float:
        """Seconds that the request waited in the client."""
        return 0.0 if self.sent is None else max(0.0, self.sent - self.ask.arrival)


def request_body(server: Server, ask: RequestInput) -> dict[str, Any]:
    """The JSON of a request.

    Raises:
      BenchError: token ids for a chat.
    """
    body: dict[str, Any] = {
        "model": ask.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.backend == "openai":
        body["prompt"] = ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)
        body["max_tokens"] = ask.output_tokens
    else:
        if not isinstance(ask.prompt, str):
            raise BenchError("a chat takes text, not token ids")
        body["messages"] = [{"role": "user", "content": ask.prompt}]
        body["max_completion_tokens"] = ask.output_tokens
    return {**body, **server.body}


async def perform(
    client: httpx.AsyncClient, server: Server, ask: RequestInput, start: float
) -> RequestResult:
    """Makes a request now. What goes wrong is in the outcome; only cancelling raises.

    Args:
      client: of the server.
      server: the server.
      ask: the request; its `arrival` is not waited for.
      start: the run's start on `time.perf_counter`'s clock.
    """
    outcome = RequestResult(ask, prompt_tokens=ask.prompt_tokens)
    body = request_body(server, ask)
    outcome.sent = time.perf_counter() - start
    try:
        async with client.stream("POST", server.api, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"HTTP {response.status_code}: {_message(text)}"
                return outcome
            await _read(response, outcome, start)
    except (httpx.HTTPError, httpx.StreamError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    except ValueError as error:  # an event that is no JSON
        outcome.error = f"the server sent what is no event: {error}"
    return outcome


async def _read(response: httpx.Response, outcome: RequestResult, start: float) -> None:
    events = done = 0
    started: float | None = None
    latest = 0.0
    async for data in _events(response):
        now = time.perf_counter() - start
        if data == b"[DONE]":
            done = 1
            break
        event = json.loads(data)
        if "error" in event:
            outcome.error = _message(data.decode(errors="replace"))
            return
        usage = event.get("usage")
        if usage:
            outcome.prompt_tokens = usage.get("prompt_tokens") or outcome.prompt_tokens
            if usage.get("completion_tokens") is not None:
                outcome.output_tokens = usage["completion_tokens"]
                outcome.counted = True
        choices = event.get("choices")
        if not choices:
            continue
        choice = choices[0]
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
        started = now if started is None else started
        outcome.end = now
        text = _text(choice)
        if text:
            events += 1
            outcome.text += text
            if outcome.first is None:
                outcome.first = now
            else:
                outcome.itl.append(now - latest)
            latest = now
    if outcome.end is None or not (done or outcome.finish_reason):
        outcome.error = "the stream ended before the answer did"
        return
    if outcome.first is None:  # tokens without text
        outcome.first = started
    if not outcome.counted:
        outcome.output_tokens = events


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each, as OpenAI's API has them."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return thought + (delta.get("content") or "")


def _message(text: str) -> str:
    """The message of an error's JSON, or the beginning of what is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or text)[:300]


async def list_models(server: Server) -> list[str]:
    """The names of the server's models.

    Raises:
      BenchError: the server is not there, or does not say.
    """
    url = f"{server.base}/v1/models"
    try:
        async with server.client() as client:
            response = await client.get(url, timeout=min(30.0, server.timeout))
    except httpx.HTTPError as error:
        raise BenchError(
            f"{url} cannot be reached: {type(error).__name__}: {error}; is the server running?"
        ) from error
    try:
        names = [entry["id"] for entry in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"{url} gave no list of models (HTTP {response.status_code}); name them with --model"
        ) from error
    if not names:
        raise BenchError(f"{url}: the server has no models")
    return names
