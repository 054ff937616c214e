"""What the endpoints accept.

Three kinds of fields: those that are honoured (the pydantic models: OpenAI's, and vLLM's names for
what OpenAI has not), those that clients send with a value that changes nothing (`UNUSED`: the value
is checked and dropped), and all others, which are refused by name. Nothing is coerced: `"5"` and
`true` are not numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from muxjax.sampling_params import MAX_LOGPROBS
from muxjax.serve.errors import ApiError
from muxjax.serve.openai.fields import (
    MAX_CHOICES,
    CompletionRequest,
    GenerationRequest,
    Strict,
    between,
)
from muxjax.serve.openai.messages import ChatMessage, Tool, ToolChoice, check_messages, check_tools
from muxjax.serve.openai.validation_errors import fault

UNUSED: Mapping[str, tuple[object, ...]] = {
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Fields of both endpoints and the values, besides null, that ask for nothing."""
UNUSED_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **UNUSED,
    "best_of": (1,),
    "suffix": ("",),
}
UNUSED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **UNUSED,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: int | None = between(1, 2**31 - 1)
    parallel_tool_calls: bool | None = None
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = None
    top_logprobs: int | None = between(0, MAX_LOGPROBS)


class TokenizeRequest(Strict):
    """The body of `/tokenize`: a prompt, or a conversation."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Default: true for a prompt, false for a conversation."
    )
    add_generation_prompt: bool | None = Field(default=None, description="Default: true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    model: str
    tokens: list[int]


class ModelRequest(Strict):
    """The body of `/models/unload`, `/models/sleep` and `/models/wake`."""

    model: str


class LoadRequest(Strict):
    """The body of `/models/load`."""

    model: str
    entry: dict[str, Any] | None = Field(
        default=None,
        description="What a fleet file would say of the model, its name apart; not needed for one "
        "that the server's fleet file has.",
    )
    unit: str | None = Field(
        default=None, description="Where; by default the unit with the least weights."
    )


Body = TypeVar("Body", bound=BaseModel)


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """Checks the body of a completion.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(CompletionRequest, data, UNUSED_IN_COMPLETIONS)
    _check_stream(request)
    prompts = request.prompts
    if not prompts or not all(prompts):
        raise ApiError("prompt must not be empty", param="prompt")
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise ApiError(f"at most {MAX_CHOICES} outputs in one call (prompts times n)", param="n")
    if data.get("best_of") is not None and (request.n or 1) > 1:
        raise ApiError(
            "best_of is not supported by this server", param="best_of", code="unsupported_field"
        )
    return request


def parse_chat(data: Mapping[str, Any]) -> ChatRequest:
    """Checks the body of a chat completion.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(ChatRequest, data, UNUSED_IN_CHAT)
    _check_stream(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            "give max_completion_tokens or max_tokens, not both", param="max_completion_tokens"
        )
    check_messages(request.messages)
    check_tools(request.tools or [], request.tool_choice)
    return request


def parse_tokenize(data: Mapping[str, Any]) -> TokenizeRequest:
    """Checks the body of `/tokenize`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(TokenizeRequest, data, {})
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("give prompt or messages, and not both", param="prompt")
    if request.messages is None:
        for name in ("tools", "add_generation_prompt"):
            if getattr(request, name) is not None:
                raise ApiError(f"{name} is for messages only", param=name)
    else:
        check_messages(request.messages)
        check_tools(request.tools or [], None)
    return request


def parse_detokenize(data: Mapping[str, Any]) -> DetokenizeRequest:
    """Checks the body of `/detokenize`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    return _parse(DetokenizeRequest, data, {})


def parse_model(data: Mapping[str, Any]) -> ModelRequest:
    """Checks a body that names a model.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    return _parse(ModelRequest, data, {})


def parse_load(data: Mapping[str, Any]) -> LoadRequest:
    """Checks the body of `/models/load`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(LoadRequest, data, {})
    if request.entry is not None and "name" in request.entry:
        raise ApiError("the model's name goes into `model`, not into `entry`", param="entry")
    return request


def _parse[Body: BaseModel](
    kind: type[Body], data: Mapping[str, Any], unused: Mapping[str, Any]
) -> Body:
    used = {}
    for name, value in data.items():
        if name in kind.model_fields:
            used[name] = value
        elif name not in unused:
            raise ApiError(f"unknown field {name!r}", param=name, code="unknown_field")
        elif value is not None and not any(_same(value, idle) for idle in unused[name]):
            raise ApiError(
                f"{name} is not supported by this server", param=name, code="unsupported_field"
            )
    try:
        return kind.model_validate(used)
    except ValidationError as error:
        raise fault(error, data) from error


def _check_stream(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is only for stream: true", param="stream_options")


def _same(value: object, idle: object) -> bool:
    """Equal and of one type: `true` is not 1."""
    return type(value) is type(idle) and value == idle
