"""Request bodies of the generation and tokenization endpoints.

There are three kinds of fields. The pydantic models list the supported fields: OpenAI's, and
extensions under vLLM's names. Fields that many clients send (`IGNORED`) are accepted only with a
value that has no effect. Any other field is refused with an error that names it. Values are not
coerced: `"5"` and `true` are not numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from muxjax.sampling_params import MAX_LOGPROBS
from muxjax.serve.errors import ApiError
from muxjax.serve.openai.fields import (
    MAX_CHOICES,
    CompletionRequest,
    GenerationRequest,
    between,
)
from muxjax.serve.openai.messages import ChatMessage, Tool, ToolChoice, check_messages, check_tools
from muxjax.serve.openai.validation_errors import explain
from muxjax.serve.request_model import StrictModel, parse_body

IGNORED: Mapping[str, tuple[object, ...]] = {
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Ignored fields of both endpoints, with the values besides null that have no effect."""
IGNORED_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **IGNORED,
    "best_of": (1,),
    "suffix": ("",),
}
IGNORED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **IGNORED,
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


class TokenizeRequest(StrictModel):
    """The body of `/tokenize`: a prompt or a conversation."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Default: true for a prompt, false for a conversation."
    )
    add_generation_prompt: bool | None = Field(default=None, description="Default: true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    """The body of `/detokenize`."""

    model: str
    tokens: list[int]


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """Parses the body of `/v1/completions`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = parse_body(CompletionRequest, data, explain, IGNORED_IN_COMPLETIONS)
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
    """Parses the body of `/v1/chat/completions`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = parse_body(ChatRequest, data, explain, IGNORED_IN_CHAT)
    _check_stream(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs requires logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            "set max_completion_tokens or max_tokens, not both", param="max_completion_tokens"
        )
    check_messages(request.messages)
    check_tools(request.tools or [], request.tool_choice)
    return request


def parse_tokenize(data: Mapping[str, Any]) -> TokenizeRequest:
    """Parses the body of `/tokenize`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = parse_body(TokenizeRequest, data, explain)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("set either prompt or messages", param="prompt")
    if request.messages is None:
        for name in ("tools", "add_generation_prompt"):
            if getattr(request, name) is not None:
                raise ApiError(f"{name} is only for messages", param=name)
    else:
        check_messages(request.messages)
        check_tools(request.tools or [], None)
    return request


def parse_detokenize(data: Mapping[str, Any]) -> DetokenizeRequest:
    """Parses the body of `/detokenize`.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    return parse_body(DetokenizeRequest, data, explain)


def _check_stream(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is only for stream: true", param="stream_options")
