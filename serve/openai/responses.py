"""The parts that answers of both endpoints share: head, usage, log-probabilities, events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from muxjax._version import __version__
from muxjax.errors import MuxError
from muxjax.scheduling.steps import TokenLogprobs
from muxjax.serve.errors import api_error
from muxjax.serve.fleet_protocol import DeltaLike, TokenizerLike
from muxjax.serve.openai.generation import GenerationCall

SYSTEM_FINGERPRINT = f"muxjax-{__version__}"
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not (OpenAI's own convention)."""

Choices = Callable[[int, DeltaLike], list[dict[str, Any]]]
"""The choices of the event, or events, for a delta of one output: none for one without news."""


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every answer and event of one call begins with; `prefix` is its id's."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": SYSTEM_FINGERPRINT,
    }


def usage(running: GenerationCall, completion_tokens: int) -> dict[str, Any]:
    """The token counts of one call, whose streams have ended."""
    prompt_tokens = running.num_prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": running.num_cached_tokens},
    }


def token_text(tokenizer: TokenizerLike | None, token: int) -> str:
    """A token for people; a model without a tokenizer has only numbers."""
    return f"token_id:{token}" if tokenizer is None else tokenizer.token_text(token)


def chat_logprobs(
    tokenizer: TokenizerLike | None, tokens: list[int], logprobs: list[TokenLogprobs]
) -> dict[str, Any]:
    """Chat's form: a list of tokens, each with its alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token)),
        }

    content = [
        {
            **entry(token, own.logprob),
            "top_logprobs": [entry(other, logprob) for other, logprob in own.top],
        }
        for token, own in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: TokenizerLike | None,
    tokens: list[int],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    alternatives: int,
    offsets: list[int],
) -> dict[str, Any]:
    """Completions' older form: four lists of equal length.

    As in OpenAI's, the chosen token is among the alternatives even when it is not one of the
    likeliest. Of two tokens with the same text the likelier one is shown.

    Args:
      tokenizer: for the tokens' texts.
      tokens: the output's, or an event's.
      logprobs: of each of them; None for the first of a prompt, which nothing precedes.
      alternatives: how many were asked for; with 0 `top_logprobs` is null.
      offsets: where each token begins in the answer's text, in characters.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
    tops: list[dict[str, float] | None] = []
    for text, own in zip(texts, logprobs, strict=True):
        if own is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, logprob in own.top:
            top.setdefault(token_text(tokenizer, other), _finite(logprob))
        top.setdefault(text, _finite(own.logprob))
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": [None if own is None else _finite(own.logprob) for own in logprobs],
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }


class Offsets:
    """Where the tokens of one answer begin in its text, in characters.

    Args:
      tokenizer: None for a model without one, whose text is empty.
    """

    def __init__(self, tokenizer: TokenizerLike | None) -> None:
        self._stream = None if tokenizer is None else tokenizer.decode_stream()
        self._length = 0

    def of(self, tokens: Sequence[int]) -> list[int]:
        """The offsets of the next tokens. One that completes a character begins where it does."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            if self._stream is not None:
                self._length += len(self._stream.push([token]))
        return offsets


async def events(
    running: GenerationCall,
    beginning: dict[str, Any],
    choices: Choices,
    *,
    first: list[dict[str, Any]],
    include_usage: bool,
    uncounted: int = 0,
) -> AsyncIterator[str]:
    """A call's server-sent events: choices as they come, usage if asked for, `[DONE]`.

    An error of the engine is the last event: the status has been sent long before.

    Args:
      running: the streams.
      beginning: what every event begins with.
      choices: makes the choices of an event.
      first: choices sent before anything has been made.
      include_usage: whether a last event without choices carries the token counts.
      uncounted: tokens of each output that were made and not asked for.
    """
    if include_usage:
        beginning = {**beginning, "usage": None}
    completion_tokens = 0
    try:
        for choice in first:
            yield _event({**beginning, "choices": [choice]})
        async for index, delta in running.deltas():
            completion_tokens += len(delta.token_ids)
            for choice in choices(index, delta):
                yield _event({**beginning, "choices": [choice]})
    except MuxError as error:
        yield _event(api_error(error).body)
        return
    if include_usage:
        made = completion_tokens - uncounted * len(running.streams)
        counts = usage(running, made)
        yield _event({**beginning, "choices": [], "usage": counts})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n"


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
