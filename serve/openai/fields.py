"""Request fields that completions and chat completions share, and their sampling parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from muxjax.grammar import Grammar
from muxjax.sampling_params import MAX_LOGPROBS, MAX_PRIORITY, MAX_SALT, SamplingParams
from muxjax.serve.errors import ApiError
from muxjax.serve.request_model import StrictModel

MAX_CHOICES = 128
"""Maximum number of outputs of one call: prompts times `n`."""
_TOKEN_ID = re.compile("[0-9]{1,10}")


def between(low: float | None, high: float | None, **options: Any) -> Any:
    """Builds a field with a range in the OpenAPI document; the engine checks the range."""
    extra: dict[str, Any] = {}
    if low is not None:
        extra["minimum"] = low
    if high is not None:
        extra["maximum"] = high
    return Field(default=None, json_schema_extra=extra, **options)


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None


class TextFormat(StrictModel):
    """Plain text without a constraint."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """A named JSON schema. It is always enforced, whatever the value of `strict`."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(StrictModel):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class GenerationRequest(StrictModel):
    """Fields of both generation endpoints. A null field counts as absent."""

    model: str
    frequency_penalty: float | None = between(-2, 2)
    logit_bias: dict[str, float] | None = Field(
        default=None, description="Bias by token id, from -100 to 100; at most 300 tokens."
    )
    max_tokens: int | None = between(0, 2**31 - 1)
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: float | None = between(-2, 2)
    response_format: ResponseFormat | None = None
    seed: int | None = between(-(2**63), 2**64 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = between(0, 100)
    top_p: float | None = between(0, 1)
    user: str | None = Field(default=None, description="Accepted and ignored.")
    ignore_eos: bool | None = Field(default=None, description="Extension.")
    min_p: float | None = between(0, 1, description="Extension.")
    min_tokens: int | None = between(0, 2**31 - 1, description="Extension.")
    repetition_penalty: float | None = between(0, 100, description="Extension.")
    priority: int | None = between(
        -MAX_PRIORITY,
        MAX_PRIORITY,
        description="Extension: higher is scheduled first; at most the priority of the API key.",
    )
    cache_salt: str | None = Field(
        default=None,
        json_schema_extra={"minLength": 1, "maxLength": MAX_SALT},
        description="Extension: cached prefixes are shared only between requests of the same salt.",
    )
    stop_token_ids: list[int] | None = Field(default=None, description="Extension.")
    top_k: int | None = between(-1, 2**31 - 1, description="Extension; 0 and -1 mean off.")

    def sampling_params(
        self,
        *,
        max_tokens: int,
        logprobs: int | None,
        choice: int,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Builds the engine's parameters for one output of a prompt.

        Args:
          max_tokens: maximum number of output tokens.
          logprobs: alternatives per output token; None for no log-probabilities.
          choice: index of the output, from 0 to `n` - 1; it is added to the seed.
          prompt_logprobs: alternatives per prompt token; None for no log-probabilities.
          grammar: the grammar of `tools`; by default the grammar of `response_format`.

        Raises:
          InvalidRequest, ApiError: a value is out of range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_default(self.temperature, 1.0),
            top_k=0 if self.top_k is None else self.top_k,
            top_p=_default(self.top_p, 1.0),
            min_p=_default(self.min_p, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            priority=self.priority,
            cache_salt=self.cache_salt,
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            seed=None if self.seed is None else self.seed + choice,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logit_bias=_parse_logit_bias(self.logit_bias or {}),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar or self.format_grammar,
        )

    @property
    def format_grammar(self) -> Grammar | None:
        """The grammar of `response_format`; None for plain text."""
        if isinstance(self.response_format, JsonObjectFormat):
            return Grammar.json_object()
        if isinstance(self.response_format, JsonSchemaFormat):
            return Grammar.json_schema(self.response_format.json_schema.schema_)
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a streamed response ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = between(0, MAX_LOGPROBS)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def _parse_logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not _TOKEN_ID.fullmatch(token):
            raise ApiError(
                f"logit_bias must have token ids as keys, not {token!r}", param="logit_bias"
            )
    return {int(token): value for token, value in bias.items()}


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
