"""One timed request: what counts as a token, what as a failure."""

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


def ask(url: str, request: RequestInput | None = None, **options: Any) -> RequestResult:
    async def once() -> RequestResult:
        server = Server(url, **options)
        async with server.session() as session:
            return await send_request(
                session, server, request or RequestInput("m", (1, 2, 3), 3, 4), time.perf_counter()
            )

    return asyncio.run(once())


def answers(*pieces: bytes, status: int = 200) -> Any:
    return lambda path, body: (status, list(pieces))


def test_a_stream_is_read_and_the_server_counts_its_tokens() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
    pieces = (
        text_event("ab"),
        text_event("c")[:9],  # events that come in pieces
        text_event("c")[9:],
        text_event("", "length"),
        event(usage),
        event(b"[DONE]"),
    )
    with serving(answers(*pieces)) as url:
        found = ask(url)
    assert found.success
    assert (found.text, found.finish_reason) == ("abc", "length")
    assert (found.prompt_tokens, found.output_tokens, found.counted) == (5, 7, True)
    assert len(found.itl) == 1  # an event without text is no token
    assert 0 < found.ttft <= found.latency
    assert found.tpot == pytest.approx((found.latency - found.ttft) / 6)


def test_without_usage_events_are_counted_and_said_to_be() -> None:
    with serving(answers(text_event("a"), text_event("b", "stop"), event(b"[DONE]"))) as url:
        found = ask(url)
    assert found.success
    assert (found.prompt_tokens, found.output_tokens, found.counted) == (3, 2, False)


def test_a_chat_is_asked_and_read() -> None:
    seen = []

    def answer(path: str, body: Any) -> tuple[int, list[bytes]]:
        seen.append((path, body))
        deltas = [{"role": "assistant", "content": ""}, {"content": "hi"}, {"reasoning": "so"}]
        events = [event({"choices": [{"delta": delta}]}) for delta in deltas]
        end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        return 200, [*events, end, event(b"[DONE]")]

    with serving(answer) as url:
        found = ask(
            url + "/v1",
            RequestInput("m", "Hello", 1, 9),
            backend="openai-chat",
            body={"temperature": 0.5},
        )
    ((path, body),) = seen
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert (body["max_completion_tokens"], body["temperature"]) == (9, 0.5)
    assert (found.text, len(found.itl), found.finish_reason) == ("hiso", 1, "stop")


@pytest.mark.parametrize(
    ("pieces", "status", "error"),
    [
        ((b'{"error": {"message": "no such model"}}',), 404, "HTTP 404: no such model"),
        ((b"busy",), 503, "HTTP 503: busy"),
        ((text_event("a"),), 200, "the stream ended before the response was complete"),
        ((), 200, "the stream ended before the response was complete"),
        ((event({"error": {"message": "out of memory"}}),), 200, "out of memory"),
        ((b"data: {nonsense\n\n",), 200, "sent an invalid event"),
    ],
)
def test_what_goes_wrong_is_in_the_outcome(
    pieces: tuple[bytes, ...], status: int, error: str
) -> None:
    with serving(answers(*pieces, status=status)) as url:
        found = ask(url)
    assert not found.success
    assert error in found.error


def test_a_server_that_does_not_answer() -> None:
    with serving(answers()) as url:
        pass
    assert "ClientConnectorError" in ask(url).error
    with pytest.raises(BenchError, match="is the server running"):
        list_models(Server(url))


def test_models_are_asked_for() -> None:
    with serving(answers(b'{"data": [{"id": "a"}, {"id": "b"}]}')) as url:
        assert list_models(Server(url)) == ["a", "b"]
    with serving(answers(b"what?", status=404)) as url, pytest.raises(BenchError, match="--model"):
        list_models(Server(url))
    with serving(answers(b'{"data": []}')) as url, pytest.raises(BenchError, match="no models"):
        list_models(Server(url))


def test_invalid_addresses_and_prompts() -> None:
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        Server("localhost:8000")
    with pytest.raises(BenchError, match="text"):
        request_body(Server("http://x", "openai-chat"), RequestInput("m", (1,), 1, 1))
