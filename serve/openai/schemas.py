"""The answers' shapes, for the OpenAPI document. Answers are made as plain dicts, which is quicker;
tests hold them to these models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from muxjax.engine.health import ModelStatus


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Every answer other than 200."""

    error: ErrorDetail


class ModelCard(_Answer):
    """A model that is served."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    status: ModelStatus
    error: str | None = None
    unit: str | None


class ModelList(_Answer):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens, those whose keys and values the prefix cache had."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens of one call."""

    model_config = ConfigDict(extra="allow")

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class _Head(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""OpenAI's; the last is never given."""


class CompletionLogprobs(_Answer):
    """Four lists of equal length, an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionResponse(_Head):
    """The answer of `/v1/completions`; with `stream` each event is one, with a part of the text."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(_Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token of the output, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    """An entry for each token."""

    content: list[ChosenLogprob] | None
    refusal: None


class CalledFunctionAnswer(_Answer):
    """A function and its arguments as JSON."""

    name: str
    arguments: str


class ToolCallAnswer(_Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AssistantMessage(_Answer):
    """The assistant's answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatChoice(_Answer):
    """One output."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Head):
    """The answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(_Answer):
    """A part of a call: the name comes first, the arguments in parts."""

    name: str | None = None
    arguments: str


class ToolCallDelta(_Answer):
    """A part of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(_Answer):
    """A part of the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(_Answer):
    """A part of one output."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Head):
    """An event of `/v1/chat/completions` with `stream`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Tokens(_Answer):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    """The answer of `/detokenize`."""

    prompt: str


class Health(_Answer):
    """The answer of `/health` and of the paths under it, whatever its status."""

    status: str
    reason: str | None = None
    unit: str | None = None


class ModelChange(_Answer):
    """What became of a model."""

    model: str
    status: ModelStatus | Literal["unloaded"]
    seconds: float


class FleetChange(_Answer):
    """What became of the fleet: names of models, and why some are not as the file says."""

    added: list[str]
    removed: list[str]
    replaced: list[str]
    changed: list[str]
    failed: dict[str, str]


class Stats(_Answer):
    """The answer of `/stats`: what the live page shows. `models` has all counters of each."""

    time: float
    stopping: bool
    stale: bool
    policy: str | None
    pool: dict[str, int]
    units: list[dict[str, Any]]
    models: list[dict[str, Any]]


_ERRORS = {
    400: "A field, or the body, that is wrong or not supported",
    401: "The API key is missing or not known",
    403: "The API key, or the page's origin, may not",
    404: "No such model",
    409: "The model's state does not allow it",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "A limit is reached; Retry-After says for how long",
    500: "A fault of the server",
    503: "The engine has ended, or the server is stopping",
    504: "The request took longer than it may",
}
BODY_ERRORS = tuple(status for status in _ERRORS if status != 409)
"""The statuses with which an endpoint that takes a body may refuse it."""
ADMIN_ERRORS = (400, 401, 403, 404, 408, 409, 413, 500, 503)
"""Those of one that changes the fleet."""
LOOK_ERRORS = (401, 403, 404, 500, 503)
"""Those of one that does not."""


def error_responses(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
    """These statuses, as FastAPI's `responses` take them."""
    return {status: {"description": _ERRORS[status], "model": ErrorAnswer} for status in statuses}
