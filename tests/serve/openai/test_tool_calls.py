"""Tools: what models are told, what grammars hold them to, and what clients get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.serve.openai.messages import ChatMessage, Tool
from muxjax.serve.openai.tool_calls import form_of, grammar_of, messages_for
from tests.serve.fake_fleet import TEMPLATE, FakeFleet, FakeModel, fake_tokenizer

EOS = 256
BYTES = ConstraintCompiler(byte_tokenizer(257), 257)
TAGGED = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + TEMPLATE
BARE = '{% if tools %}{{ tools | tojson }}{"name":, "parameters":}{% endif %}' + TEMPLATE
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}" + TEMPLATE

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
TOOLS = [Tool.model_validate(WEATHER), Tool.model_validate(TIME)]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BARE_CALL = '{"name": "weather", "parameters": {"place": "Rome", "days": 7}}'


def fits(grammar: Grammar, text: str) -> bool:
    """Whether the grammar takes the whole text and lets it end there."""
    constraint = BYTES.start(grammar, (EOS,))
    ended = False
    for byte in text.encode():
        if ended or not constraint.mask[byte // 32] >> (byte % 32) & 1:
            return False
        ended = constraint.advance(byte)
    return ended or bool(constraint.mask[EOS // 32] >> (EOS % 32) & 1)


@pytest.mark.parametrize(
    ("template", "begin", "arguments", "native"),
    [
        (TAGGED, "<tool_call>\n", "arguments", True),
        (BARE, "", "parameters", True),
        (MISTRAL, "<tool_call>\n", "arguments", False),
        (TEMPLATE, "<tool_call>\n", "arguments", False),
        (None, "<tool_call>\n", "arguments", False),
        ("{% broken", "<tool_call>\n", "arguments", False),
    ],
)
def test_forms(template: str | None, begin: str, arguments: str, native: bool) -> None:
    form = form_of(template)
    assert (form.begin, form.arguments, form.native) == (begin, arguments, native)


ANSWER = Grammar.json_schema({"type": "object", "required": ["x"], "properties": {"x": {}}})


@pytest.mark.parametrize(
    ("template", "text", "several", "good", "bad"),
    [
        (
            TAGGED,
            True,
            True,
            ["", "hello", "a <tool", CALL, f"Yes: {CALL}", f"{CALL}\n{OTHER}\n{CALL}"],
            [
                f"{CALL} more",
                "<tool_call>\nhm",
                CALL.replace("weather", "wether"),
                CALL.replace("place", "plaice"),
                CALL.replace('"Rome"', "3"),
                CALL.replace("}}", ', "days": 3}}'),
                OTHER.replace("{}", '{"a": 1}'),
            ],
        ),
        (TAGGED, True, False, ["hello", f"Yes: {CALL}"], [f"{CALL}\n{OTHER}"]),
        (TAGGED, False, True, [CALL, f"{CALL}\n{OTHER}"], ["", "hello", f"Yes: {CALL}"]),
        (TAGGED, False, False, [CALL, OTHER], [f"{CALL}\n{OTHER}"]),
        (TAGGED, ANSWER, True, ['{"x": 3}', CALL], ["hello", '{"y": 3}', f"Yes: {CALL}"]),
        (BARE, True, True, ["", "hello {", BARE_CALL], ["{", '{"x": 3}', "{}"]),
        (BARE, False, True, [BARE_CALL], ["hello", f"{BARE_CALL}\n{BARE_CALL}"]),
    ],
)
def test_grammars(
    template: str, text: Grammar | bool, several: bool, good: list[str], bad: list[str]
) -> None:
    grammar = grammar_of(form_of(template), TOOLS, text=text, several=several)
    for one in good:
        assert fits(grammar, one), one
    for one in bad:
        assert not fits(grammar, one), one


def test_json_besides_bare_calls_is_refused(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(BARE), 4096)}
    fleet.text = BARE_CALL
    wanted = {"type": "json_object"}
    with pytest.raises(openai.BadRequestError, match="needs a tool_choice") as caught:
        ask(client, response_format=wanted)
    assert caught.value.param == "response_format"
    answer = ask(client, response_format=wanted, tool_choice="required").choices[0]
    assert answer.message.tool_calls[0].function.name == "weather"


def test_settings_in_a_schema_do_not_loosen_it() -> None:
    parameters = {"x-guidance": {"lenient": True}, "not": {}}
    tool = Tool.model_validate({**TIME, "function": {"name": "f", "parameters": parameters}})
    with pytest.raises(ValueError, match="not"):
        BYTES.start(grammar_of(form_of(TAGGED), [tool], text=False, several=True), (EOS,))


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"place": "Rome"}'},
            },
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "time", "arguments": "{}"},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
]


def test_templates_that_know_tools_get_them() -> None:
    messages = [ChatMessage.model_validate(message) for message in CONVERSATION]
    found = messages_for(form_of(TAGGED), messages, TOOLS)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"place": "Rome"}
    assert found[2] == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_other_templates_get_text() -> None:
    messages = [ChatMessage.model_validate(message) for message in CONVERSATION]
    found = messages_for(form_of(TEMPLATE), messages, TOOLS)
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert '"name": "weather"' in found[0]["content"]
    assert found[2]["content"] == f"{CALL}\n{OTHER}"
    assert found[3]["content"] == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    )
    told = [ChatMessage(role="system", content="Be kind."), *messages]
    assert messages_for(form_of(TEMPLATE), told, TOOLS)[0]["content"].startswith("Be kind.\n\nYou")


@pytest.fixture
def client(server: str, fleet: FakeFleet) -> Iterator[openai.OpenAI]:
    fleet.models = {"chat": FakeModel("chat", fake_tokenizer(TEMPLATE), 4096)}
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": "x"}]
    tools: Any = [WEATHER, TIME]
    asked: dict[str, Any] = {"messages": messages, "tools": tools, **more}
    return client.chat.completions.create(model="chat", **asked)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (None, "tool_calls"),
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, "stop"),
    ],
)
def test_calls_reach_the_client(
    client: openai.OpenAI, fleet: FakeFleet, choice: Any, reason: str
) -> None:
    fleet.text = CALL
    answer = ask(client, tool_choice=choice).choices[0]
    assert answer.finish_reason == reason
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"place": "Rome"}
    assert fleet.asked[0][2].grammar is not None
    assert b"<tools>" in bytes(token for token in fleet.asked[0][1] if token < 256)


def test_calls_in_a_stream(client: openai.OpenAI, fleet: FakeFleet) -> None:
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


def test_text_and_the_choice_none(client: openai.OpenAI, fleet: FakeFleet) -> None:
    fleet.text = "It is noon."
    answer = ask(client).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It is noon.", "stop")
    assert answer.message.tool_calls is None
    fleet.text = CALL
    answer = ask(client, tool_choice="none").choices[0]
    assert (answer.message.content, answer.message.tool_calls) == (CALL, None)
    assert fleet.asked[1][2].grammar is None
    assert b"tools" not in bytes(fleet.asked[1][1])


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI, fleet: FakeFleet) -> None:
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
    prompt = bytes(token for token in fleet.asked[1][1] if token < 256).decode()
    assert f"<assistant>{CALL}" in prompt
    assert "<user><tool_response>\nsunny" in prompt
    assert np.all(np.array(fleet.asked[1][1]) < EOS)
