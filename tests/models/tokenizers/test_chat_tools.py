"""Tool calling: the prompt that describes the tools, and the grammar of valid calls."""

from __future__ import annotations

from typing import Any

import pytest

from muxjax.engine.grammar_constraints import ConstraintCompiler
from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.models.tokenizers.chat_tools import (
    normalize_message,
    normalize_tool,
    template_messages,
    tool_call_format,
    tool_call_grammar,
)

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
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
TOOLS = [normalize_tool(WEATHER), normalize_tool(TIME)]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BARE_CALL = '{"name": "weather", "parameters": {"place": "Rome", "days": 7}}'


def matches(grammar: Grammar, text: str) -> bool:
    """Whether the grammar accepts the text as a complete output."""
    constraint = BYTES.compile(grammar, (EOS,))
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
def test_tool_call_format(template: str | None, begin: str, arguments: str, native: bool) -> None:
    call_format = tool_call_format(template)
    assert (call_format.begin, call_format.arguments_key, call_format.native) == (
        begin,
        arguments,
        native,
    )


ANSWER = Grammar.json_schema({"type": "object", "required": ["x"], "properties": {"x": {}}})


@pytest.mark.parametrize(
    ("template", "text", "parallel", "good", "bad"),
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
def test_tool_call_grammar(
    template: str, text: Grammar | bool, parallel: bool, good: list[str], bad: list[str]
) -> None:
    grammar = tool_call_grammar(tool_call_format(template), TOOLS, text=text, parallel=parallel)
    for output in good:
        assert matches(grammar, output), output
    for output in bad:
        assert not matches(grammar, output), output


def test_x_guidance_in_a_schema_is_ignored() -> None:
    parameters = {"x-guidance": {"lenient": True}, "not": {}}
    tool = normalize_tool({**TIME, "function": {"name": "f", "parameters": parameters}})
    with pytest.raises(ValueError, match="not"):
        BYTES.compile(
            tool_call_grammar(tool_call_format(TAGGED), [tool], text=False, parallel=True), (EOS,)
        )


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


def test_native_templates_receive_tool_messages() -> None:
    messages = [normalize_message(message) for message in CONVERSATION]
    rendered = template_messages(tool_call_format(TAGGED), messages, TOOLS)
    assert rendered[1]["tool_calls"][0]["function"]["arguments"] == {"place": "Rome"}
    assert rendered[2] == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_other_templates_receive_text() -> None:
    messages = [normalize_message(message) for message in CONVERSATION]
    rendered = template_messages(tool_call_format(TEMPLATE), messages, TOOLS)
    assert [message["role"] for message in rendered] == ["system", "user", "assistant", "user"]
    assert '"name": "weather"' in rendered[0]["content"]
    assert rendered[2]["content"] == f"{CALL}\n{OTHER}"
    assert rendered[3]["content"] == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    )
    with_system = [{"role": "system", "content": "Be kind."}, *messages]
    assert template_messages(tool_call_format(TEMPLATE), with_system, TOOLS)[0][
        "content"
    ].startswith("Be kind.\n\nYou")


def test_messages_are_normalized() -> None:
    parts = {"role": "developer", "content": [{"type": "text", "text": t} for t in ("a", "b")]}
    assert normalize_message(parts) == {"role": "system", "content": "ab"}
    assert normalize_message({"role": "user", "content": None, "name": None})["content"] == ""
    for bad, message in [
        ({"content": "a"}, "needs a role"),
        ({"role": "user", "content": 3}, "must be a string"),
        ({"role": "user", "content": [{"type": "image"}]}, "must be a string"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]},
            "the call to f must be a JSON object",
        ),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            normalize_message(bad)


def test_tools_are_normalized() -> None:
    assert normalize_tool(TIME)["function"] == {
        "name": "time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    assert normalize_tool(WEATHER) == WEATHER
    with pytest.raises(InvalidRequest, match="with a name"):
        normalize_tool({"type": "function"})
    with pytest.raises(InvalidRequest, match="type object"):
        normalize_tool({"function": {"name": "f", "parameters": {"type": "string"}}})
