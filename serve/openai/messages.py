"""Messages and tools in the bodies of `/v1/chat/completions` and `/tokenize`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from muxjax.serve.errors import ApiError
from muxjax.serve.request_model import StrictModel

_NAME = "^[a-zA-Z0-9_-]{1,64}$"


class TextPart(StrictModel):
    """A text part of a message. Other kinds of parts are refused."""

    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    """Name and arguments (as JSON) of a called function."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: str


class ToolCall(StrictModel):
    """A tool call in an earlier message of the assistant."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = Field(
        default=None, description="Only for the role assistant."
    )
    tool_call_id: str | None = Field(
        default=None, description="Only for the role tool: id of the call that it answers."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_null_fields(cls, message: Any) -> Any:
        """Drops unknown null fields, because clients send back responses with `refusal: null`."""
        if not isinstance(message, dict):
            return message
        return {
            name: value
            for name, value in message.items()
            if value is not None or name in cls.model_fields
        }

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """Converts the message for a chat template. `developer` is an alias of `system`."""
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


class Function(StrictModel):
    """A function that the model may call. Its schema is always enforced, even without `strict`."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments. A function without parameters takes no arguments."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(StrictModel):
    """A tool; functions are the only type."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Converts the tool for a chat template."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.arguments_schema
        return {"type": "function", "function": function}


class NamedFunction(StrictModel):
    """The name of a function among the tools."""

    name: str


class NamedTool(StrictModel):
    """A tool choice: the model must call this function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_messages(messages: list[ChatMessage]) -> None:
    """Checks that the fields of each message fit its role.

    Raises:
      ApiError: 400, naming the message.
    """
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.tool_calls is not None and message.role != "assistant":
            raise _field_error(f"{where}.tool_calls", "is only for the role assistant")
        if (message.tool_call_id is not None) != (message.role == "tool"):
            problem = "is missing" if message.role == "tool" else "is only for the role tool"
            raise _field_error(f"{where}.tool_call_id", problem)
        if message.content is None and not message.tool_calls:
            raise _field_error(f"{where}.content", "must be a string or a list of text parts")
        for position, call in enumerate(message.tool_calls or ()):
            arguments = f"{where}.tool_calls[{position}].function.arguments"
            try:
                parsed = json.loads(call.function.arguments, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                parsed = None
            if not isinstance(parsed, dict):
                raise _field_error(arguments, "must be a string with a JSON object")


def check_tools(tools: list[Tool], choice: ToolChoice | None) -> None:
    """Checks that tool names are unique and that the tool choice names one of them.

    Raises:
      ApiError: 400, naming the field.
    """
    names = [tool.function.name for tool in tools]
    for index, tool in enumerate(tools):
        where = f"tools[{index}].function"
        if tool.function.name in names[:index]:
            raise _field_error(
                f"{where}.name", f"is {tool.function.name!r}, the name of another tool"
            )
        if tool.function.arguments_schema["type"] != "object":
            raise _field_error(f"{where}.parameters", "must be a schema of type object")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise _field_error("tool_choice", f"names {choice.function.name!r}, which is not in tools")
    if choice == "required" and not tools:
        raise _field_error("tool_choice", "is required, but tools is empty")


def _field_error(field: str, problem: str) -> ApiError:
    return ApiError(f"{field} {problem}", param=field)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")
