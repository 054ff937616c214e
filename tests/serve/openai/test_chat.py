"""Chat completions without a server: prompts, limits and tool choices."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from muxjax.errors import InvalidRequest
from muxjax.serve.errors import ApiError
from muxjax.serve.openai.chat import chat, encode_conversation
from muxjax.serve.openai.messages import ChatMessage
from tests.serve.fake_fleet import TEMPLATE, FakeFleet, FakeModel, fake_tokenizer

BODY = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


async def receive() -> Any:
    await asyncio.sleep(60)


def ask(fleet: FakeFleet, **change: Any) -> dict[str, Any]:
    async def call() -> Any:
        return await chat(fleet, Request({"type": "http"}, receive), {**BODY, **change})

    (choice,) = json.loads(asyncio.run(call()).body)["choices"]
    return choice


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    fleet = FakeFleet(text="hello")
    choice = ask(fleet)
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert choice["finish_reason"] == "stop"
    (_, prompt, params), *_ = fleet.requests
    assert bytes(prompt) == b"<user>hi\n<assistant>"
    assert params.max_tokens == 256 - len(prompt)
    assert not fleet.active


def test_errors_name_the_endpoint_fields() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(FakeFleet(), messages=[{"role": "user", "content": "x" * 300}])
    assert caught.value.field == "messages"
    with pytest.raises(ApiError, match="use /v1/completions"):
        ask(FakeFleet(), model="ids")


def test_finish_reason_of_tool_calls() -> None:
    fleet = FakeFleet(text=CALL)
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(TEMPLATE), 4096)}
    choice = ask(fleet, tools=[TOOL])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
    named = {"type": "function", "function": {"name": "time"}}
    assert ask(fleet, tools=[TOOL], tool_choice=named)["finish_reason"] == "stop"
    choice = ask(fleet, tools=[TOOL], tool_choice="none")
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_a_conversation_is_rendered_by_the_template() -> None:
    messages = [ChatMessage(role="developer", content="be kind")]
    model = FakeFleet().models["chat"]
    prompt = encode_conversation(model, messages, [], add_generation_prompt=False)
    assert bytes(prompt) == b"<system>be kind\n"
