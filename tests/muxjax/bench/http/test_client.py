"""Streamed requests: timing, token counts and errors."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from muxjax.bench.http.client import (
    RequestInput,
    RequestResult,
    Server,
    list_models,
    request_body,
    send_request,
)
from muxjax.errors import BenchError
from tests.muxjax.bench.servers import event, serving, text_event


def send(url: str, request: RequestInput | None = None, **options: Any) -> RequestResult:
    async def run() -> RequestResult:
        server = Server(url, **options)
        async with server.session() as session:
            return await send_request(
                session, server, request or RequestInput("m", (1, 2, 3), 3, 4), time.perf_counter()
            )

    return asyncio.run(run())


def respond(*chunks: bytes, status: int = 200) -> Any:
    return lambda path, body: (status, list(chunks))


def test_token_counts_come_from_usage() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    chunks = (
        text_event("ab"),
        text_event("c")[:9],  # an event in two chunks
        text_event("c")[9:],
        text_event("", "length"),
        event(usage),
        event(b"[DONE]"),
    )
    with serving(respond(*chunks)) as url:
        result = send(url)
    assert result.success
    assert (result.text, result.finish_reason) == ("abc", "length")
    assert (result.prompt_tokens, result.output_tokens, result.counted) == (5, 7, True)
    assert len(result.itl) == 1  # events without text are not counted
    assert 0 < result.ttft <= result.latency
    assert result.tpot == pytest.approx((result.latency - result.ttft) / 6)


def test_events_are_counted_without_usage() -> None:
    with serving(respond(text_event("a"), text_event("b", "stop"), event(b"[DONE]"))) as url:
        result = send(url)
    assert result.success
    assert (result.prompt_tokens, result.output_tokens, result.counted) == (3, 2, False)


def test_chat_streams_are_read() -> None:
    seen = []

    def answer(path: str, body: Any) -> tuple[int, list[bytes]]:
        seen.append((path, body))
        deltas = [{"role": "assistant", "content": ""}, {"content": "hi"}, {"reasoning": "so"}]
        events = [event({"choices": [{"delta": delta}]}) for delta in deltas]
        end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        return 200, [*events, end, event(b"[DONE]")]

    with serving(answer) as url:
        result = send(
            url + "/v1",
            RequestInput("m", "Hello", 1, 9),
            backend="openai-chat",
            body={"temperature": 0.5},
        )
    ((path, body),) = seen
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["max_completion_tokens"], body["temperature"]) == (9, 0.5)
    assert (result.text, len(result.itl), result.finish_reason) == ("hiso", 1, "stop")


@pytest.mark.parametrize(
    ("chunks", "status", "error"),
    [
        ((b'{"error": {"message": "no such model"}}',), 404, "HTTP 404: no such model"),
        ((b"busy",), 503, "HTTP 503: busy"),
        ((text_event("a"),), 200, "the stream ended before the response was complete"),
        ((), 200, "the stream ended before the response was complete"),
        ((event({"error": {"message": "out of memory"}}),), 200, "out of memory"),
        ((b"data: {nonsense\n\n",), 200, "sent an invalid event"),
    ],
)
def test_failures_are_in_the_result(chunks: tuple[bytes, ...], status: int, error: str) -> None:
    with serving(respond(*chunks, status=status)) as url:
        result = send(url)
    assert not result.success
    assert error in result.error


def test_an_unreachable_server_is_an_error() -> None:
    with serving(respond()) as url:
        pass
    assert "ClientConnectorError" in send(url).error
    with pytest.raises(BenchError, match="is the server running"):
        list_models(Server(url))


def test_models_are_listed() -> None:
    with serving(respond(b'{"data": [{"id": "a"}, {"id": "b"}]}')) as url:
        assert list_models(Server(url)) == ["a", "b"]
    with serving(respond(b"what?", status=404)) as url, pytest.raises(BenchError, match="--model"):
        list_models(Server(url))
    with serving(respond(b'{"data": []}')) as url, pytest.raises(BenchError, match="no models"):
        list_models(Server(url))


def test_invalid_addresses_and_prompts() -> None:
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        Server("localhost:8000")
    with pytest.raises(BenchError, match="text"):
        request_body(Server("http://x", "openai-chat"), RequestInput("m", (1,), 1, 1))
