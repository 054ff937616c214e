"""Conversations as prompts, and tool calls read from outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from muxjax.engine.chat_prompt import ChatPrompt
from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.byte_tokenizer import byte_tokenizer
from muxjax.outputs import Completion, FunctionCall
from muxjax.sampling_params import SamplingParams

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NATIVE = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + TEMPLATE
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
MESSAGES = [{"role": "user", "content": "When?"}]
PARAMS = SamplingParams(seed=1)


def render(template: str, *tools: dict[str, Any], params: SamplingParams = PARAMS) -> ChatPrompt:
    tokenizer = dataclasses.replace(byte_tokenizer(257), chat_template=template)
    return ChatPrompt.render(tokenizer, MESSAGES, params, tools)


def text_of(prompt: ChatPrompt) -> str:
    return bytes(prompt.token_ids).decode()


def test_a_conversation_is_rendered_with_the_template() -> None:
    prompt = render(TEMPLATE)
    assert text_of(prompt) == "<user>When?\n<assistant>"
    assert (prompt.params, prompt.call_format) == (PARAMS, None)


def test_tools_are_rendered_by_the_template_or_described() -> None:
    native, described = render(NATIVE, TOOL), render(TEMPLATE, TOOL)
    assert text_of(native).startswith('[{"type": "function"')
    assert text_of(described).startswith("<system>You can call these functions")
    for prompt in (native, described):
        assert prompt.params.grammar is not None
        assert prompt.params.seed == 1


def test_tool_calls_are_parsed_from_the_output() -> None:
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    completion = Completion(f"Let me see. {call}", [1], "stop", None, [2])
    parsed = render(NATIVE, TOOL).parse_calls(completion)
    assert parsed.text == "Let me see. "
    assert parsed.tool_calls == [FunctionCall("time", "{}")]
    assert render(NATIVE).parse_calls(completion) is completion


def test_conversation_that_cannot_be_rendered_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        ChatPrompt.render(None, MESSAGES, PARAMS, [])
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatPrompt.render(byte_tokenizer(257), MESSAGES, PARAMS, [])
    with pytest.raises(InvalidRequest, match="cannot be combined"):
        render(NATIVE, TOOL, params=SamplingParams(grammar=Grammar.json_object()))
