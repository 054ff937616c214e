"""Completions without a server: responses, echo and streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from muxjax.errors import InvalidRequest
from muxjax.serve.errors import ApiError
from muxjax.serve.openai.completions import complete
from muxjax.serve.openai.event_stream import EventStream
from tests.serve.fake_fleet import FakeFleet

BODY = {"model": "chat", "prompt": "ab", "max_tokens": 3}


async def receive() -> Any:
    await asyncio.sleep(60)


def ask(fleet: FakeFleet, **change: Any) -> dict[str, Any]:
    async def call() -> Any:
        request = Request({"type": "http"}, receive)
        return await complete(fleet, request, {**BODY, **change})

    return json.loads(asyncio.run(call()).body)


def test_response_with_several_outputs() -> None:
    fleet = FakeFleet()
    response = ask(fleet, n=2)
    assert [choice["text"] for choice in response["choices"]] == ["aba", "aba"]
    assert response["usage"]["total_tokens"] == 9
    assert not fleet.active


def test_echo_with_no_tokens_scores_the_prompt() -> None:
    response = ask(FakeFleet(), echo=True, max_tokens=0, logprobs=0)
    (choice,) = response["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert response["usage"]["completion_tokens"] == 0


def test_invalid_requests_are_refused() -> None:
    fleet = FakeFleet()
    with pytest.raises(ApiError, match="cannot echo"):
        ask(fleet, model="ids", prompt=[1], echo=True)
    with pytest.raises(ApiError, match="send token ids"):
        ask(fleet, model="ids")
    with pytest.raises(InvalidRequest, match="out of range"):
        ask(fleet, prompt=[1000])
    assert not fleet.active


def test_a_disconnect_before_the_first_event_cancels_the_call() -> None:
    fleet = FakeFleet(delay=1.0)

    async def test() -> None:
        async def disconnect() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        request = Request({"type": "http"}, disconnect)
        response = await complete(fleet, request, {**BODY, "stream": True})
        assert isinstance(response, EventStream)
        assert fleet.active
        await response({"type": "http"}, disconnect, send)
        assert not fleet.active

    asyncio.run(test())
