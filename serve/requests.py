"""What `/v1/completions` and `/v1/chat/completions` accept, and how it reaches the engine.

Three kinds of fields: those that are honoured (the pydantic models below: OpenAI's, and vLLM's
names for what OpenAI has not), those that clients send with a value that changes nothing (`UNUSED`:
the value is checked and dropped), and all others, which are refused by name. Nothing is coerced:
`"5"` and `true` are not numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from muxjax.sampling_params import SamplingParams
from muxjax.serve.errors import ApiError

MAX_CHOICES = 128
"""Most outputs of one call: prompts times `n`."""

UNUSED: Mapping[str, tuple[object, ...]] = {
    "logit_bias": ({},),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Fields of both endpoints and the values, besides null, that ask for nothing."""
UNUSED_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **UNUSED,
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
UNUSED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **UNUSED,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

_EXPECTED = {
    "ignore_eos": "true or false",
    "messages": "a list of messages with a role and a content",
    "model": "the name of a model",
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "a string or a list of strings",
    "stop_token_ids": "a list of token ids",
    "stream": "true or false",
    "stream_options": "an object",
    "stream_options.include_usage": "true or false",
    "user": "a string",
}
_WHOLE = ("max_tokens", "max_completion_tokens", "seed", "top_k", "top_logprobs")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """The fields of both endpoints. Null means absent; ranges are the engine's to check."""

    model: str
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = Field(default=None, description="Accepted and not used.")
    ignore_eos: bool | None = Field(default=None, description="Extension.")
    min_p: float | None = Field(default=None, description="Extension.")
    repetition_penalty: float | None = Field(default=None, description="Extension.")
    priority: int | None = Field(default=None, description="Extension: higher goes first.")
    stop_token_ids: list[int] | None = Field(default=None, description="Extension.")
    top_k: int | None = Field(default=None, description="Extension; 0 and -1 mean off.")

    def sampling(self, *, max_tokens: int, logprobs: int | None, choice: int) -> SamplingParams:
        """The engine's parameters for the `choice`-th output of a prompt.

        Raises:
          InvalidRequest: a value out of its range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_k=0 if self.top_k is None or self.top_k == -1 else self.top_k,
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            priority=_or(self.priority, 0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=None if self.seed is None else self.seed + choice,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One text, or one list of token ids, for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Strict):
    """A part of a message. Other kinds than text are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, message: Any) -> Any:
        """An answer sent back as it came has its unused fields (`tool_calls`, ...) as null."""
        if not isinstance(message, dict):
            return message
        return {
            name: value
            for name, value in message.items()
            if value is not None or name in cls.model_fields
        }

    def for_template(self) -> dict[str, str]:
        """As chat templates take it. `developer` is OpenAI's newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = None


Body = TypeVar("Body", bound=GenerationRequest)


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """Checks the body of a completion.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(CompletionRequest, data, UNUSED_IN_COMPLETIONS)
    prompts = request.prompts
    if not prompts or not all(prompts):
        raise ApiError("prompt must not be empty", param="prompt")
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise ApiError(f"at most {MAX_CHOICES} outputs in one call (prompts times n)", param="n")
    return request


def parse_chat(data: Mapping[str, Any]) -> ChatRequest:
    """Checks the body of a chat completion.

    Raises:
      ApiError: 400, naming the field at fault.
    """
    request = _parse(ChatRequest, data, UNUSED_IN_CHAT)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            "give max_completion_tokens or max_tokens, not both", param="max_completion_tokens"
        )
    return request


def _parse(kind: type[Body], data: Mapping[str, Any], unused: Mapping[str, Any]) -> Body:
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
        request = kind.model_validate(used)
    except ValidationError as error:
        raise _fault(error, data) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is only for stream: true", param="stream_options")
    return request


def _fault(error: ValidationError, data: Mapping[str, Any]) -> ApiError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(f"{field} is missing", param=field)
    if field == "messages" and len(first["loc"]) > 1:
        return _message_fault(error)
    if field == "stream_options" and len(first["loc"]) > 1:
        field = f"stream_options.{first['loc'][1]}"
        if first["type"] == "extra_forbidden":
            return ApiError(f"{field} is not supported by this server", param=field)
    value = data.get(field)
    if field == "logprobs" and isinstance(value, (bool, int)):
        return ApiError(
            "logprobs is a number in completions and true or false in chat", param="logprobs"
        )
    expected = _EXPECTED.get(field, "a whole number" if field in _WHOLE else "a number")
    return ApiError(f"{field} must be {expected}", param=field)


def _message_fault(error: ValidationError) -> ApiError:
    """What is wrong with one message. The union of `content` reports each of its branches."""
    first = error.errors(include_url=False)[0]
    where = f"messages[{first['loc'][1]}]"
    inner = str(first["loc"][2]) if len(first["loc"]) > 2 else ""
    if not inner:
        return ApiError(f"{where} must be an object", param=where)
    where = f"{where}.{inner}"
    if first["type"] == "missing":
        return ApiError(f"{where} is missing", param=where)
    if first["type"] == "extra_forbidden":
        return ApiError(f"{where} is not supported by this server", param=where)
    if inner == "role":
        return ApiError(f"{where} must be system, developer, user or assistant", param=where)
    return ApiError(f"{where} must be a string or a list of text parts", param=where)


def _same(value: object, idle: object) -> bool:
    """Equal and of one type: `true` is not 1."""
    return type(value) is type(idle) and value == idle


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
