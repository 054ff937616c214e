"""`/v1/chat/completions`: the assistant's answer to a conversation."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.errors import InvalidRequest
from muxjax.serve.answers import chat_logprobs, events, head, usage
from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, ModelLike, TokenizerLike
from muxjax.serve.models import find_model
from muxjax.serve.requests import ChatRequest, parse_chat
from muxjax.serve.running import EventStream, Output, start, unless_gone


async def chat(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, whole or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    asked = parse_chat(data)
    model = find_model(fleet, asked.model)
    prompt = await asyncio.to_thread(_token_ids, model, asked)
    field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(asked, field)
    # Without a limit an answer may go on to the end of the model's context.
    max_tokens = max(1, model.max_model_len - len(prompt)) if limit is None else limit
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    try:
        params = [
            asked.sampling(max_tokens=max_tokens, logprobs=logprobs, choice=choice)
            for choice in range(asked.n or 1)
        ]
        running = start(fleet, model.name, [prompt], params)
    except InvalidRequest as error:
        raise _in_chats_words(error, field) from error
    if asked.stream:
        beginning = head("chatcmpl", "chat.completion.chunk", model.name)
        first = [
            _chunk(index, {"role": "assistant", "content": ""}, None, None)
            for index in range(len(params))
        ]

        def choices(index: int, delta: DeltaLike) -> list[dict[str, Any]]:
            return _chunks(asked, model.tokenizer, index, delta)

        return EventStream(
            events(running, beginning, choices, first=first, include_usage=asked.include_usage),
            running,
        )
    beginning = head("chatcmpl", "chat.completion", model.name)
    try:
        outputs = await unless_gone(request, running.outputs())
    finally:
        running.cancel()
    answers = [
        _choice(asked, model.tokenizer, index, output) for index, output in enumerate(outputs)
    ]
    made = sum(len(output.token_ids) for output in outputs)
    counts = usage(running.num_prompt_tokens, made)
    return JSONResponse({**beginning, "choices": answers, "usage": counts})


def _token_ids(model: ModelLike, asked: ChatRequest) -> list[int]:
    """The conversation through the model's own template, which brings its special tokens."""
    if model.tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer: use /v1/completions", param="model")
    text = model.tokenizer.apply_chat([message.for_template() for message in asked.messages])
    return model.tokenizer.encode(text, add_special=False)


def _in_chats_words(error: InvalidRequest, limit: str) -> InvalidRequest:
    """The engine's message with the name that the field has in chat requests."""
    names = {"max_tokens": limit, "logprobs": "top_logprobs", "prompt": "messages"}
    own = error.field or ""
    field = names.get(own, own)
    message = str(error)
    if own and message.startswith(own):
        message = field + message.removeprefix(own)
    return InvalidRequest(message, field=field or None)


def _choice(
    asked: ChatRequest, tokenizer: TokenizerLike | None, index: int, output: Output
) -> dict[str, Any]:
    logprobs = None
    if asked.logprobs:
        logprobs = chat_logprobs(tokenizer, output.token_ids, output.logprobs)
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }


def _chunks(
    asked: ChatRequest, tokenizer: TokenizerLike | None, index: int, delta: DeltaLike
) -> list[dict[str, Any]]:
    """An event for what was made, and an empty one that says why the output ended."""
    chunks = []
    if delta.text or (asked.logprobs and delta.token_ids):
        logprobs = None
        if asked.logprobs:
            logprobs = chat_logprobs(tokenizer, list(delta.token_ids), list(delta.logprobs or ()))
        chunks.append(_chunk(index, {"content": delta.text}, logprobs, None))
    if delta.finish_reason:
        chunks.append(_chunk(index, {}, None, delta.finish_reason))
    return chunks


def _chunk(
    index: int,
    delta: dict[str, str],
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
