"""`/v1/completions`: the text, or token ids, that follow a prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.answers import completion_logprobs, events, head, token_text, usage
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, TokenizerLike
from muxjax.serve.models import find_model
from muxjax.serve.requests import CompletionRequest, parse_completion
from muxjax.serve.running import EventStream, Output, Running, start, unless_gone

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def complete(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, whole or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    asked = parse_completion(data)
    model = find_model(fleet, asked.model)
    prompts = await asyncio.to_thread(_token_ids, model.tokenizer, asked)
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    params = [
        asked.sampling(max_tokens=max_tokens, logprobs=asked.logprobs, choice=choice)
        for choice in range(asked.n or 1)
    ]
    running = start(fleet, model.name, prompts, params)
    beginning = head("cmpl", "text_completion", model.name)
    if asked.stream:
        choices = _Choices(asked, model.tokenizer, len(running.streams))
        return EventStream(
            events(running, beginning, choices.of, first=[], include_usage=asked.include_usage),
            running,
        )
    try:
        outputs = await unless_gone(request, running.outputs())
    finally:
        running.cancel()
    return JSONResponse(_answer(beginning, asked, model.tokenizer, running, outputs))


def _token_ids(tokenizer: TokenizerLike | None, asked: CompletionRequest) -> list[list[int]]:
    """The prompts as token ids, which a client may have sent itself."""
    prompts = []
    for prompt in asked.prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise ApiError(f"{asked.model} has no tokenizer: send token ids", param="prompt")
        if isinstance(prompt, str) and tokenizer is not None:
            prompt = tokenizer.encode(prompt)
        prompts.append(list(prompt))
    return prompts  # type: ignore[return-value]


def _answer(
    beginning: dict[str, Any],
    asked: CompletionRequest,
    tokenizer: TokenizerLike | None,
    running: Running,
    outputs: list[Output],
) -> dict[str, Any]:
    choices = [
        _choice(asked, tokenizer, index, output.token_ids, output.logprobs, output)
        for index, output in enumerate(outputs)
    ]
    made = sum(len(output.token_ids) for output in outputs)
    return {**beginning, "choices": choices, "usage": usage(running.num_prompt_tokens, made)}


def _choice(
    asked: CompletionRequest,
    tokenizer: TokenizerLike | None,
    index: int,
    tokens: list[int],
    logprobs: list[TokenLogprobs],
    made: Output | DeltaLike,
    offset: int = 0,
) -> dict[str, Any]:
    reported = None
    if asked.logprobs is not None:
        reported = completion_logprobs(
            tokenizer, tokens, logprobs, alternatives=asked.logprobs, offset=offset
        )
    return {
        "index": index,
        "text": made.text,
        "logprobs": reported,
        "finish_reason": made.finish_reason,
    }


class _Choices:
    """The choices of a stream's events; remembers where the tokens of each output begin."""

    def __init__(
        self, asked: CompletionRequest, tokenizer: TokenizerLike | None, outputs: int
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._offsets = [0] * outputs

    def of(self, index: int, delta: DeltaLike) -> list[dict[str, Any]]:
        reporting = self._asked.logprobs is not None
        if not (delta.text or delta.finish_reason or (reporting and delta.token_ids)):
            return []
        tokens = list(delta.token_ids)
        choice = _choice(
            self._asked,
            self._tokenizer,
            index,
            tokens,
            list(delta.logprobs or ()),
            delta,
            self._offsets[index],
        )
        if reporting:
            self._offsets[index] += sum(len(token_text(self._tokenizer, t)) for t in tokens)
        return [choice]
