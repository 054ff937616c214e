r"""Tool calling: the prompt that describes the tools, and the grammar of valid calls.

Chat templates use one of two formats for calls:

- `<tool_call>` (Hermes, Qwen, SmolLM2): any text, then for each call
  `<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>`;
- bare JSON (Llama 3): either text, or one call, `{"name": "f", "parameters": {...}}`.

If a template supports neither, the system message describes the tools and the first format, and
earlier calls and their results become text.

The grammar enforces the format and the schemas of the arguments, so the output of any model can be
parsed (`tool_call_parser`).

Tools and messages are mappings in the form of OpenAI's API, which chat templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.chat_template import supports_tools

_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": "[ \\n\\r\\t]{1,20}",
}


@dataclass(frozen=True)
class ToolCallFormat:
    """The text format of a model's tool calls.

    Attributes:
      begin: text before a call; empty if a call is the whole output.
      end: text after a call.
      arguments_key: JSON key of the arguments.
      native: whether the model's chat template renders tools.
    """

    begin: str
    end: str
    arguments_key: str
    native: bool

    @property
    def opening(self) -> str:
        """Text from the start of a call to the function's name."""
        return f'{self.begin}{{"name": "'

    @property
    def middle(self) -> str:
        """Text between the function's name and its arguments."""
        return f'", "{self.arguments_key}": '

    @property
    def closing(self) -> str:
        """Text from the end of the arguments to the end of the call."""
        return "}" + self.end

    @property
    def has_delimiters(self) -> bool:
        """Whether calls are delimited; an output may then contain text and several calls."""
        return bool(self.begin)


def tool_call_format(template: str | None) -> ToolCallFormat:
    """The format of calls in a chat template (Jinja source)."""
    native = template is not None and supports_tools(template)
    if native and template is not None and "<tool_call>" not in template:
        if '"parameters"' in template or "'parameters'" in template:
            return ToolCallFormat("", "", "parameters", True)
        native = False
    return ToolCallFormat("<tool_call>\n", "\n</tool_call>", "arguments", native)


def tool_call_grammar(
    call_format: ToolCallFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    text: Grammar | bool,
    parallel: bool,
) -> Grammar:
    """The grammar of an output that may or must call tools.

    Args:
      call_format: format of the calls.
      tools: the tools that may be called, at least one. `function.parameters` is the schema of a
        tool's arguments.
      text: output that is allowed instead of calls. False: none, a call is required. True: any
        text, and with delimiters also text before calls. A JSON Schema grammar: JSON that is valid
        under it; requires a format with delimiters.
      parallel: whether several calls are allowed.
    """
    # The text after a call's `begin`; the first call's `begin` ends the text before it.
    rest = _quote('{"name": "')
    calls = [
        f"{_quote(tool['function']['name'] + call_format.middle)} arguments_{index}"
        for index, tool in enumerate(tools)
    ]
    rules = [f"body: {rest} pick {_quote(call_format.closing)}", f"pick: {' | '.join(calls)}"]
    for index, tool in enumerate(tools):
        schema = tool["function"].get("parameters", {"type": "object"})
        rules.append(f"arguments_{index}: %json {_schema(schema)}")
    call = f"{_quote(call_format.begin)} body" if call_format.begin else "body"
    next_calls = f"({_quote(chr(10))} {call})*" if parallel and call_format.has_delimiters else ""
    if text is False:
        rules.insert(0, f"start: {call} {next_calls}")
    elif text is True and call_format.has_delimiters:
        rules.insert(0, f"start: TEXT | head body {next_calls}")
        # Lazy: the first `begin` ends the text, so the text cannot contain one.
        rules += [f"head[lazy]: TEXT {_quote(call_format.begin)}", "TEXT: /(.|\\n)*/"]
    elif text is True:
        rules.insert(0, "start: TEXT | body")
        rules.append("TEXT: /([^{](.|\\n)*)?/")
    else:
        assert isinstance(text, Grammar)
        assert call_format.has_delimiters
        rules.insert(0, f"start: json | {call} {next_calls}")
        rules.append(f"json: %json {_schema(json.loads(text.text))}")
    return Grammar.lark("\n".join(rules) + "\n")


def template_messages(
    call_format: ToolCallFormat,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Prepares a conversation for the model's chat template.

    If the template has no native support, tools become text: the tools in the system message,
    earlier calls in the assistant's messages, and their results in user messages.

    Args:
      call_format: format of the calls.
      messages: each with `role` and `content` (a string), and optionally `tool_calls` (arguments as
        a mapping) or `tool_call_id`.
      tools: the tools that the model may call.
    """
    if call_format.native:
        return [dict(message) for message in messages]
    rendered: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        plain = dict(message)
        calls = plain.pop("tool_calls", [])
        parts = [plain["content"]] if plain["content"] else []
        parts += [_write_call(call_format, call["function"]) for call in calls]
        plain["content"] = "\n".join(parts)
        is_result = plain.pop("tool_call_id", None) is not None
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                rendered[-1]["content"] += "\n" + text
                continue
            plain = {"role": "user", "content": text}
        after_result = is_result
        rendered.append(plain)
    if tools:
        instructions = _instructions(call_format, tools)
        if rendered and rendered[0]["role"] == "system":
            rendered[0]["content"] += "\n\n" + instructions
        else:
            rendered.insert(0, {"role": "system", "content": instructions})
    return rendered


def normalize_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Normalizes a message of OpenAI's API for chat templates.

    `content` becomes a string (text parts are joined, None is empty), the arguments of `tool_calls`
    become mappings, and the role `developer` becomes `system`.

    Raises:
      InvalidRequest: the message has no role, has content other than text, or its arguments are not
        a JSON object.
    """
    if not isinstance(message.get("role"), str):
        raise InvalidRequest("a message needs a role", field="messages")
    plain = {name: value for name, value in message.items() if value is not None}
    if plain["role"] == "developer":
        plain["role"] = "system"
    plain["content"] = _content_text(message.get("content"))
    if "tool_calls" in plain:
        plain["tool_calls"] = [_normalize_call(call) for call in plain["tool_calls"]]
    return plain


def normalize_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Normalizes a tool of OpenAI's API: its arguments get an object schema.

    Raises:
      InvalidRequest: the tool is not a function with a name, or its parameters are not of type
        object.
    """
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest("a tool must be a function with a name", field="tools")
    parameters = function.get("parameters")
    if not parameters:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    parameters = {"type": "object", **parameters}
    if parameters["type"] != "object":
        raise InvalidRequest(
            f"the parameters of {function['name']} must be a schema of type object", field="tools"
        )
    labels = {
        key: function[key] for key in ("name", "description") if function.get(key) is not None
    }
    return {"type": "function", "function": {**labels, "parameters": parameters}}


def _content_text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise InvalidRequest("content must be a string or a list of text parts", field="messages")


def _normalize_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(
            f"the arguments of the call to {function['name']} must be a JSON object",
            field="messages",
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _write_call(call_format: ToolCallFormat, function: Mapping[str, Any]) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return (
        f"{call_format.opening}{function['name']}{call_format.middle}{arguments}"
        f"{call_format.closing}"
    )


def _instructions(call_format: ToolCallFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    listing = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = f"{call_format.opening}NAME{call_format.middle}{{ARGUMENTS}}{call_format.closing}"
    return (
        "You can call these functions to help with the user's request:\n"
        f"<tools>\n{listing}\n</tools>\n"
        f"To call one, answer with its name and its arguments as JSON:\n{example}"
    )


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(schema: Any) -> str:
    """A JSON Schema on one line, with MuxJAX's llguidance options instead of its `x-guidance`."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
