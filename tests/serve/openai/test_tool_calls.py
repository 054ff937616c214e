"""Tool calls with OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.serve.fake_fleet import TEMPLATE, FakeFleet, FakeModel, fake_tokenizer

EOS = 256
BARE = '{% if tools %}{{ tools | tojson }}{"name":, "parameters":}{% endif %}' + TEMPLATE

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"enum": [1, 7]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BARE_CALL = '{"name": "weather", "parameters": {"place": "Rome", "days": 7}}'


@pytest.fixture
def client(server: str, fleet: FakeFleet) -> Iterator[openai.OpenAI]:
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(TEMPLATE), 4096)}
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **change: Any) -> Any:
    messages: Any = [{"role": "user", "content": "x"}]
    tools: Any = [WEATHER, TIME]
    fields: dict[str, Any] = {"messages": messages, "tools": tools, **change}
    return client.chat.completions.create(model="chat", **fields)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (None, "tool_calls"),
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, "stop"),
    ],
)
def test_tool_calls_are_parsed(
    client: openai.OpenAI, fleet: FakeFleet, choice: Any, reason: str
) -> None:
    fleet.text = CALL
    answer = ask(client, tool_choice=choice).choices[0]
    assert answer.finish_reason == reason
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"place": "Rome"}
    assert fleet.requests[0][2].grammar is not None
    assert b"<tools>" in bytes(token for token in fleet.requests[0][1] if token < 256)


def test_streamed_tool_calls_are_parsed(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = f"Let me see. {CALL}\n{OTHER}"
    content, reason = "", None
    calls: dict[int, dict[str, str]] = {}
    for event in ask(client, stream=True, logprobs=True):
        (choice,) = event.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or ():
            if part.id is not None:
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            calls[part.index]["arguments"] += part.function.arguments
    assert (content, reason) == ("Let me see. ", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [
        ("weather", '{"place": "Rome"}'),
        ("time", "{}"),
    ]


def test_text_output_and_tool_choice_none(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = "It is noon."
    answer = ask(client).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is noon.", "stop")
    assert answer.message.tool_calls is None
    fleet.text = CALL
    answer = ask(client, tool_choice="none").choices[0]
    assert (answer.message.content, answer.message.tool_calls) == (CALL, None)
    assert fleet.requests[1][2].grammar is None
    assert b"tools" not in bytes(fleet.requests[1][1])


def test_tool_results_are_part_of_the_prompt(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = CALL
    message = ask(client).choices[0].message
    fleet.text = "Sunny."
    history = [
        {"role": "user", "content": "x"},
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    answer = ask(client, messages=history).choices[0]
    assert answer.message.content == "Sunny."
    prompt = bytes(token for token in fleet.requests[1][1] if token < 256).decode()
    assert f"<assistant>{CALL}" in prompt
    assert "<user><tool_response>\nsunny" in prompt
    assert np.all(np.array(fleet.requests[1][1]) < EOS)


def test_response_format_with_bare_tool_calls_is_refused(
    client: openai.OpenAI, fleet: FakeFleet
) -> None:
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(BARE), 4096)}
    fleet.text = BARE_CALL
    json_format = {"type": "json_object"}
    with pytest.raises(openai.BadRequestError, match="needs a tool_choice") as caught:
        ask(client, response_format=json_format)
    assert caught.value.param == "response_format"
    answer = ask(client, response_format=json_format, tool_choice="required").choices[0]
    assert answer.message.tool_calls[0].function.name == "weather"
