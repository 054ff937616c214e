"""Server-sent events: their bytes, the last event, and cancellation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from muxjax.outputs import Delta
from muxjax.sampling_params import SamplingParams
from muxjax.serve.openai.event_stream import DeltaFormatter, EventStream
from muxjax.serve.openai.generation import start_generation
from tests.serve.fake_fleet import FakeFleet

HEADER = {"id": "x-1", "object": "test"}


def format_delta(index: int, delta: Delta) -> list[dict[str, Any]]:
    return [{"index": index, "text": delta.text}]


async def respond(
    fleet: FakeFleet,
    *,
    disconnect_after: float | None = None,
    formatter: DeltaFormatter = format_delta,
    **options: Any,
) -> list[dict[str, Any]]:
    """Runs the response of one call and returns the ASGI messages that it sends."""
    call = await start_generation(fleet, "chat", [list(b"ab")], [SamplingParams(max_tokens=3)])
    options = {"include_usage": False, **options}
    response = EventStream(call, HEADER, formatter, **options)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60 if disconnect_after is None else disconnect_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await response({"type": "http"}, receive, send)
    return sent


def lines(messages: list[dict[str, Any]]) -> list[str]:
    body = b"".join(message["body"] for message in messages[1:]).decode()
    assert body.endswith("\n\n")
    return [event.removeprefix("data: ") for event in body.split("\n\n")[:-1]]


def test_each_choice_is_one_event() -> None:
    messages = asyncio.run(respond(FakeFleet(), first_choices=[{"index": 0, "role": "é"}]))
    headers = dict(messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert [message["more_body"] for message in messages[1:]] == [True] * 5 + [False]
    first, *rest, done = lines(messages)
    assert first == '{"id":"x-1","object":"test","choices":[{"index":0,"role":"é"}]}'
    assert [json.loads(event)["choices"][0]["text"] for event in rest] == ["a", "b", "a"]
    assert done == "[DONE]"


def test_usage_is_the_last_event() -> None:
    messages = asyncio.run(respond(FakeFleet(), include_usage=True, uncounted=1))
    *events, usage, done = lines(messages)
    assert all(json.loads(event)["usage"] is None for event in events)
    event = json.loads(usage)
    assert (event["choices"], event["usage"]["completion_tokens"]) == ([], 2)
    assert done == "[DONE]"


def test_an_engine_error_is_the_last_event() -> None:
    *events, last = lines(asyncio.run(respond(FakeFleet(die_after=1))))
    assert len(events) == 1
    assert json.loads(last)["error"]["code"] == "engine_dead"


def test_a_disconnect_cancels_the_call() -> None:
    fleet = FakeFleet(delay=1.0)
    messages = asyncio.run(respond(fleet, disconnect_after=0.01))
    assert [message["type"] for message in messages] == ["http.response.start"]
    assert not fleet.active


def test_a_formatter_error_cancels_the_call() -> None:
    fleet = FakeFleet(delay=0.01)

    def fail(index: int, delta: Delta) -> list[dict[str, Any]]:
        raise ValueError("cannot format")

    with pytest.raises(ValueError, match="cannot format"):
        asyncio.run(respond(fleet, formatter=fail))
    assert not fleet.active
