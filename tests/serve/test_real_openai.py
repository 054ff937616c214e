"""OpenAI's client with a real engine and a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from muxjax import Fleet
from tests.muxjax.tiny_fleets import fleet as tiny_fleet
from tests.serve.conftest import running_server

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"enum": ["x", "y"]},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
TEMPLATE = "{{ messages[0].content }}{% if tools %} <tool_call>{% endif %}"
SCHEMA = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Fleet]:
    with Fleet.load(tiny_fleet("llama")) as fleet:
        # A byte vocabulary has no chat template; this one is short, for a small model.
        object.__setattr__(fleet.models["llama"].tokenizer, "chat_template", TEMPLATE)
        yield fleet


@pytest.fixture(scope="module")
def client(loaded: Fleet) -> Iterator[openai.OpenAI]:
    with (
        running_server(loaded) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **change: Any) -> Any:
    fields: dict[str, Any] = {"max_completion_tokens": 100, "seed": 3, **change}
    messages: Any = [{"role": "user", "content": "hi"}]
    return client.chat.completions.create(model="llama", messages=messages, **fields)


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_outputs_conform_to_their_schema(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "colors", "schema": SCHEMA}}
    answer = ask(client, response_format=form, n=3, temperature=temperature)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    streamed = "".join(
        event.choices[0].delta.content or ""
        for event in ask(client, response_format=form, temperature=temperature, stream=True)
    )
    assert streamed == answer.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_well_formed(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        parts = [
            part
            for event in ask(client, **options, stream=True)
            for part in event.choices[0].delta.tool_calls or ()
        ]
        name, arguments = parts[0].function.name, "".join(p.function.arguments for p in parts)
    else:
        (call,) = ask(client, **options).choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "add"
    jsonschema.validate(json.loads(arguments), TOOL["function"]["parameters"])


def test_logit_bias_and_prompt_logprobs(client: openai.OpenAI) -> None:
    forced = ask(client, logit_bias={"65": 100}, temperature=0, max_completion_tokens=4)
    assert forced.choices[0].message.content == "AAAA"
    fields: dict[str, Any] = {"model": "llama", "prompt": "hello", "logprobs": 2}
    scored = client.completions.create(**fields, echo=True, max_tokens=0).choices[0]
    generated = client.completions.create(**fields, echo=True, max_tokens=2, temperature=0).choices[
        0
    ]
    assert scored.logprobs
    assert generated.logprobs
    assert scored.logprobs.token_logprobs
    assert generated.logprobs.token_logprobs
    assert scored.text == "hello"
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.token_logprobs[1:] == generated.logprobs.token_logprobs[1:5]
    assert generated.logprobs.token_logprobs[5] == max(
        (generated.logprobs.top_logprobs or [])[5].values()
    )


def test_errors_name_the_field(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        ask(client, response_format=form)
    assert caught.value.param == "response_format"
    broken = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="not") as caught:
        ask(client, tools=[broken])
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="not a token id") as caught:
        ask(client, logit_bias={"300": 1})
    assert caught.value.param == "logit_bias"
