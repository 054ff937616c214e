"""`/v1/completions`: the text, or token ids, that follow a prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.errors import InvalidRequest
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.errors import ApiError, in_words_of
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, TokenizerLike
from muxjax.serve.openai.fields import CompletionRequest
from muxjax.serve.find_model import find_model
from muxjax.serve.openai.generation import EventStream, GeneratedOutput, cancel_on_disconnect, start
from muxjax.serve.openai.requests import parse_completion
from muxjax.serve.openai.responses import Offsets, completion_logprobs, events, head, usage

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def complete(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, whole or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    asked = parse_completion(data)
    model = find_model(fleet, asked.model)
    if asked.echo and model.tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer, so no text to echo", param="echo")
    prompts = await asyncio.to_thread(_token_ids, model.tokenizer, asked)
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    names = {"grammar": "response_format"}
    # With `echo` nothing need be made; the engine makes one token at least, which is dropped.
    only_echo = bool(asked.echo) and max_tokens == 0
    try:
        params = [
            asked.sampling(
                max_tokens=1 if only_echo else max_tokens,
                logprobs=asked.logprobs,
                choice=choice,
                prompt_logprobs=asked.logprobs if asked.echo else None,
            )
            for choice in range(asked.n or 1)
        ]
        running = await start(fleet, model.name, prompts, params)
    except InvalidRequest as error:
        raise in_words_of(error, names) from error
    choices = [
        _CompletionChoice(asked, model.tokenizer, index, prompts[index // len(params)], only_echo)
        for index in range(len(running.streams))
    ]
    beginning = head("cmpl", "text_completion", model.name)
    uncounted = int(only_echo)
    if asked.stream:
        return EventStream(
            events(
                running,
                beginning,
                lambda index, delta: choices[index].of(delta),
                first=[],
                include_usage=asked.include_usage,
                uncounted=uncounted,
            ),
            running,
        )
    try:
        outputs = await cancel_on_disconnect(request, running.outputs())
    except InvalidRequest as error:  # a grammar that could not be followed to its end
        raise in_words_of(error, names) from error
    finally:
        running.cancel()
    made = sum(len(output.token_ids) - uncounted for output in outputs)
    return JSONResponse(
        {
            **beginning,
            "choices": [
                choice.whole(output) for choice, output in zip(choices, outputs, strict=True)
            ],
            "usage": usage(running, made),
        }
    )


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


class _CompletionChoice:
    """One output, whole or in events. With `echo` the prompt is its first part."""

    def __init__(
        self,
        asked: CompletionRequest,
        tokenizer: TokenizerLike | None,
        index: int,
        prompt: list[int],
        only_echo: bool,
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._index = index
        self._only_echo = only_echo
        self._offsets = Offsets(tokenizer)
        self._echo = prompt if asked.echo else None

    def whole(self, output: GeneratedOutput) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        return self._choice(output)

    def of(self, delta: DeltaLike) -> list[dict[str, Any]]:
        """The choices of an event, none if it has nothing to say."""
        news = delta.text or delta.finish_reason or self._echo is not None
        if not news and not (self._asked.logprobs is not None and delta.token_ids):
            return []
        return [self._choice(delta)]

    def _choice(self, made: DeltaLike | GeneratedOutput) -> dict[str, Any]:
        text, tokens = made.text, list(made.token_ids)
        logprobs: list[TokenLogprobs | None] = list(made.logprobs or ())
        if self._only_echo:
            text, tokens, logprobs = "", [], []
        if self._echo is not None:
            text = self._echoed() + text
            tokens = self._echo + tokens
            logprobs = [None, *(made.prompt_logprobs or ()), *logprobs]
            self._echo = None
        reported = None
        if self._asked.logprobs is not None:
            reported = completion_logprobs(
                self._tokenizer,
                tokens,
                logprobs,
                alternatives=self._asked.logprobs,
                offsets=self._offsets.of(tokens),
            )
        reason = made.finish_reason
        return {
            "index": self._index,
            "text": text,
            "logprobs": reported,
            "finish_reason": "length" if reason and self._only_echo else reason,
        }

    def _echoed(self) -> str:
        """The prompt as the client gave it; of token ids, their text."""
        prompts = self._asked.prompts
        given = prompts[self._index // (self._asked.n or 1)]
        if isinstance(given, str):
            return given
        assert self._tokenizer is not None
        return self._tokenizer.decode(given)
