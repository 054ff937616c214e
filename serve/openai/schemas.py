"""Response models of the generation and tokenization endpoints, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from muxjax.serve.schemas import ResponseModel


class PromptTokensDetails(ResponseModel):
    """Number of prompt tokens found in the prefix cache."""

    cached_tokens: int


class Usage(ResponseModel):
    """Token counts of one call."""

    model_config = ConfigDict(extra="allow")

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class _ResponseHeader(ResponseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""OpenAI's finish reasons; `content_filter` is never used."""


class CompletionLogprobs(ResponseModel):
    """Four lists of equal length, with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionResponse(_ResponseHeader):
    """Response of `/v1/completions`, and each event of a streamed response."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(ResponseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token of the output with the most likely alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities with one entry per token."""

    content: list[ChosenLogprob] | None
    refusal: None


class CalledFunctionResponse(ResponseModel):
    """Name and arguments (as JSON) of a called function."""

    name: str
    arguments: str


class ToolCallResponse(ResponseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunctionResponse


class AssistantMessage(ResponseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallResponse] | None = None


class ChatChoice(ResponseModel):
    """One output."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_ResponseHeader):
    """Response of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(ResponseModel):
    """Part of a called function: first its name, then its arguments in parts."""

    name: str | None = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """Part of a tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(ResponseModel):
    """Part of the assistant's message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(ResponseModel):
    """Part of one output."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_ResponseHeader):
    """Event of a streamed response of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TokenizeResponse(ResponseModel):
    """Response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(ResponseModel):
    """Response of `/detokenize`."""

    prompt: str
