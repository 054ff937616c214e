"""Conversations and tools, as `/v1/chat/completions` and `/tokenize` take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from muxjax.serve.errors import ApiError
from muxjax.serve.openai.fields import Strict

_NAME = "^[a-zA-Z0-9_-]{1,64}$"


class TextPart(Strict):
    """A part of a message. Other kinds than text are refused."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A function that the model called, and its arguments as JSON."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: str


class ToolCall(Strict):
    """A call that the model made in an earlier answer."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, description="Of the assistant only.")
    tool_call_id: str | None = Field(default=None, description="Of role tool: the call answered.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """An answer sent back as it came has its unused fields (`refusal`, ...) as null."""
        if not isinstance(message, dict):
            return message
        return {
            name: value
            for name, value in message.items()
            if value is not None or name in cls.model_fields
        }

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it. `developer` is OpenAI's newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Strict):
    """A function that the model may call. Its schema is always enforced, whatever `strict` says."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON Schema of the arguments; of a function without parameters, no arguments."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.schema_of_arguments
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    """The name of one of the tools."""

    name: str


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_messages(messages: list[ChatMessage]) -> None:
    """Checks what a message's role asks of its other fields.

    Raises:
      ApiError: 400, naming the message.
    """
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.tool_calls is not None and message.role != "assistant":
            raise _fault(f"{where}.tool_calls", "is for the role assistant only")
        if (message.tool_call_id is not None) != (message.role == "tool"):
            fault = "is missing" if message.role == "tool" else "is for the role tool only"
            raise _fault(f"{where}.tool_call_id", fault)
        if message.content is None and not message.tool_calls:
            raise _fault(f"{where}.content", "must be a string or a list of text parts")
        for at, call in enumerate(message.tool_calls or ()):
            arguments = f"{where}.tool_calls[{at}].function.arguments"
            try:
                parsed = json.loads(call.function.arguments, parse_constant=_no_constant)
            except (ValueError, RecursionError):
                parsed = None
            if not isinstance(parsed, dict):
                raise _fault(arguments, "must be a JSON object in a string")


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Checks that tools can be told apart and that the one chosen is there.

    Raises:
      ApiError: 400, naming the field.
    """
    names = [tool.function.name for tool in tools]
    for index, tool in enumerate(tools):
        where = f"tools[{index}].function"
        if tool.function.name in names[:index]:
            raise _fault(f"{where}.name", f"is {tool.function.name!r}, as that of another tool")
        if tool.function.schema_of_arguments["type"] != "object":
            raise _fault(f"{where}.parameters", "must be a schema of type object")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise _fault("tool_choice", f"names {choice.function.name!r}, which is not among tools")
    if choice == "required" and not tools:
        raise _fault("tool_choice", "is required, but there are no tools")


def _fault(field: str, what: str) -> ApiError:
    return ApiError(f"{field} {what}", param=field)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")
