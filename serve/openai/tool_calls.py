r"""Calls of tools: what the model is told, the grammar that it must follow, and reading it back.

Models write calls in one of two forms, which their chat templates show:

- `<tool_call>` (Hermes, Qwen, SmolLM2): any text, then for each call
  `<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>`;
- bare (Llama 3): either text, or one call, `{"name": "f", "parameters": {...}}`.

A template that knows neither is not given the tools: they are described in the system message, in
the first form, and so are earlier calls and their results.

Whatever a model has learned, a grammar holds it to the form and to the schemas, so what it writes
can be read without guessing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from muxjax.grammar import Grammar
from muxjax.models.tokenizers.chat_template import supports_tools
from muxjax.serve.openai.messages import ChatMessage, Tool

_SPACES = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": "[ \\n\\r\\t]{1,20}"}


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls.

    Attributes:
      begin: before a call. Empty: a call is all of the answer.
      end: after it.
      arguments: the name that the arguments have.
      native: whether the model's template shows tools itself.
    """

    begin: str
    end: str
    arguments: str
    native: bool

    @property
    def opening(self) -> str:
        """From the beginning of a call to the function's name."""
        return f'{self.begin}{{"name": "'

    @property
    def middle(self) -> str:
        """From the name to the arguments."""
        return f'", "{self.arguments}": '

    @property
    def closing(self) -> str:
        """From the end of the arguments to that of the call."""
        return "}" + self.end

    @property
    def many(self) -> bool:
        """Whether an answer may hold text and several calls."""
        return bool(self.begin)


def form_of(template: str | None) -> CallForm:
    """The form that a chat template shows to its model."""
    known = template is not None and supports_tools(template)
    if known and template is not None and "<tool_call>" not in template:
        if '"parameters"' in template or "'parameters'" in template:
            return CallForm("", "", "parameters", True)
        known = False
    return CallForm("<tool_call>\n", "\n</tool_call>", "arguments", known)


def grammar_of(
    form: CallForm, tools: Sequence[Tool], *, text: Grammar | bool, several: bool
) -> Grammar:
    """The grammar of an answer that may or must call tools.

    Args:
      form: how calls are written.
      tools: those that may be called; at least one.
      text: what the answer may be instead: False for nothing (a call is required), True for any
        text, before calls as well where the form has room for it, or JSON of a schema, where the
        form has a `begin` that tells calls from JSON.
      several: whether there may be several calls.
    """
    # After the `begin` of a first call, which ends a text before it.
    rest = _quoted('{"name": "')
    calls = [
        f"{_quoted(tool.function.name + form.middle)} arguments_{index}"
        for index, tool in enumerate(tools)
    ]
    rules = [f"body: {rest} pick {_quoted(form.closing)}", f"pick: {' | '.join(calls)}"]
    for index, tool in enumerate(tools):
        rules.append(f"arguments_{index}: %json {_schema(tool.function.schema_of_arguments)}")
    call = f"{_quoted(form.begin)} body" if form.begin else "body"
    more = f"({_quoted(chr(10))} {call})*" if several and form.many else ""
    if text is False:
        rules.insert(0, f"start: {call} {more}")
    elif text is True and form.many:
        rules.insert(0, f"start: TEXT | head body {more}")
        # Lazy: the first `begin` ends the text, so none can hide in it.
        rules += [f"head[lazy]: TEXT {_quoted(form.begin)}", "TEXT: /(.|\\n)*/"]
    elif text is True:
        rules.insert(0, "start: TEXT | body")
        rules.append("TEXT: /([^{](.|\\n)*)?/")
    else:
        assert isinstance(text, Grammar)
        assert form.many
        rules.insert(0, f"start: json | {call} {more}")
        rules.append(f"json: %json {_schema(json.loads(text.text))}")
    return Grammar.lark("\n".join(rules) + "\n")


def messages_for(
    form: CallForm, messages: Sequence[ChatMessage], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """A conversation for the model's template, with tools where it does not know them."""
    if form.native:
        return [message.for_template() for message in messages]
    found: list[dict[str, Any]] = []
    for message in messages:
        plain = message.for_template()
        calls = plain.pop("tool_calls", [])
        texts = [plain["content"]] if plain["content"] else []
        texts += [_written(form, call["function"]) for call in calls]
        plain["content"] = "\n".join(texts)
        if plain.pop("tool_call_id", None) is not None:
            plain = {
                "role": "user",
                "content": f"<tool_response>\n{message.text}\n</tool_response>",
            }
            if found and found[-1].get("results"):
                found[-1]["content"] += "\n" + plain["content"]
                continue
            plain["results"] = True
        found.append(plain)
    for plain in found:
        plain.pop("results", None)
    if tools:
        told = _instructions(form, tools)
        if found and found[0]["role"] == "system":
            found[0]["content"] += "\n\n" + told
        else:
            found.insert(0, {"role": "system", "content": told})
    return found


def _written(form: CallForm, function: dict[str, Any]) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{form.opening}{function['name']}{form.middle}{arguments}{form.closing}"


def _instructions(form: CallForm, tools: Sequence[Tool]) -> str:
    described = "\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools)
    example = f"{form.opening}NAME{form.middle}{{ARGUMENTS}}{form.closing}"
    return (
        "You can call these functions to help with the user's request:\n"
        f"<tools>\n{described}\n</tools>\n"
        f"To call one, answer with its name and its arguments as JSON:\n{example}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(schema: Any) -> str:
    """A schema on one line, with our own settings in place of any that it brings."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return json.dumps({**schema, "x-guidance": _SPACES})
