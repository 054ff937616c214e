"""`/v1/completions`: continues a prompt, given as text or token ids."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.errors import InvalidRequest
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.outputs import Delta
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.errors import ApiError, rename_field
from muxjax.serve.find_model import find_model
from muxjax.serve.fleet_protocol import FleetLike
from muxjax.serve.openai.event_stream import EventStream
from muxjax.serve.openai.fields import CompletionRequest
from muxjax.serve.openai.generation import GeneratedOutput, cancel_on_disconnect, start_generation
from muxjax.serve.openai.logprobs import TextOffsets, completion_logprobs
from muxjax.serve.openai.requests import parse_completion
from muxjax.serve.openai.responses import response_header, usage_counts

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default."""
_FIELD_NAMES = {"grammar": "response_format"}
"""Endpoint field names by engine field name."""


async def complete(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, in one response or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    body = parse_completion(data)
    model = find_model(fleet, body.model)
    if body.echo and model.tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer, so it cannot echo text", param="echo")
    prompts = await asyncio.to_thread(_encode_prompts, model.tokenizer, body)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # `echo` with max_tokens 0 scores the prompt. The engine generates at least one token; it is
    # dropped.
    prompt_only = bool(body.echo) and max_tokens == 0
    try:
        params = [
            body.sampling_params(
                max_tokens=1 if prompt_only else max_tokens,
                logprobs=body.logprobs,
                choice=choice,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
            for choice in range(body.n or 1)
        ]
        call = await start_generation(fleet, model.name, prompts, params)
    except InvalidRequest as error:
        raise rename_field(error, _FIELD_NAMES) from error
    choices = [
        _CompletionChoice(body, model.tokenizer, index, prompts[index // len(params)], prompt_only)
        for index in range(len(call.streams))
    ]
    header = response_header("cmpl", "text_completion", model.name)
    uncounted = int(prompt_only)
    if body.stream:
        return EventStream(
            call,
            header,
            lambda index, delta: choices[index].chunks(delta),
            include_usage=body.include_usage,
            uncounted=uncounted,
        )
    try:
        outputs = await cancel_on_disconnect(request.receive, call.collect())
    except InvalidRequest as error:  # the output cannot satisfy its grammar
        raise rename_field(error, _FIELD_NAMES) from error
    finally:
        call.cancel()
    generated = sum(len(output.token_ids) - uncounted for output in outputs)
    return JSONResponse(
        {
            **header,
            "choices": [
                choice.format(output) for choice, output in zip(choices, outputs, strict=True)
            ],
            "usage": usage_counts(call, generated),
        }
    )


def _encode_prompts(tokenizer: Tokenizer | None, body: CompletionRequest) -> list[list[int]]:
    """Returns the token ids of each prompt; encodes prompts that are text."""
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise ApiError(f"{body.model} has no tokenizer: send token ids", param="prompt")
        if isinstance(prompt, str) and tokenizer is not None:
            prompt = tokenizer.encode(prompt)
        prompts.append(list(prompt))
    return prompts  # type: ignore[return-value]


class _CompletionChoice:
    """Formats one output. With `echo`, it begins with the prompt."""

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Tokenizer | None,
        index: int,
        prompt: list[int],
        prompt_only: bool,
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._index = index
        self._prompt_only = prompt_only
        self._offsets = TextOffsets(tokenizer)
        self._echo = prompt if body.echo else None

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Formats a delta; an empty list if there is nothing to send."""
        has_content = delta.text or delta.finish_reason or self._echo is not None
        has_logprobs = self._body.logprobs is not None and delta.token_ids
        return [self.format(delta)] if has_content or has_logprobs else []

    def format(self, output: Delta | GeneratedOutput) -> dict[str, Any]:
        """Formats a complete output or a delta."""
        text, tokens = output.text, list(output.token_ids)
        logprobs: list[TokenLogprobs | None] = list(output.logprobs or ())
        if self._prompt_only:
            text, tokens, logprobs = "", [], []
        if self._echo is not None:
            text = self._prompt_text() + text
            tokens = self._echo + tokens
            logprobs = [None, *(output.prompt_logprobs or ()), *logprobs]
            self._echo = None
        formatted = None
        if self._body.logprobs is not None:
            formatted = completion_logprobs(
                self._tokenizer,
                tokens,
                logprobs,
                alternatives=self._body.logprobs,
                offsets=self._offsets.advance(tokens),
            )
        reason = output.finish_reason
        return {
            "index": self._index,
            "text": text,
            "logprobs": formatted,
            "finish_reason": "length" if reason and self._prompt_only else reason,
        }

    def _prompt_text(self) -> str:
        """The prompt as the client sent it; decoded if it was sent as token ids."""
        prompts = self._body.prompts
        prompt = prompts[self._index // (self._body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        assert self._tokenizer is not None
        return self._tokenizer.decode(prompt)
