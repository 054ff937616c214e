"""`/v1/chat/completions`: the assistant's answer to a conversation."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from muxjax.errors import InvalidRequest
from muxjax.grammar import Grammar
from muxjax.models.tokenizers.chat_tools import (
    ToolCallFormat,
    template_messages,
    tool_call_format,
    tool_call_grammar,
)
from muxjax.models.tokenizers.tool_call_parser import ParsedPiece, ToolCallParser
from muxjax.serve.errors import ApiError, in_words_of
from muxjax.serve.fleet_protocol import DeltaLike, FleetLike, ModelLike, TokenizerLike
from muxjax.serve.openai.find_model import find_model
from muxjax.serve.openai.generation import EventStream, GeneratedOutput, cancel_on_disconnect, start
from muxjax.serve.openai.messages import ChatMessage, NamedTool, Tool
from muxjax.serve.openai.requests import ChatRequest, parse_chat
from muxjax.serve.openai.responses import chat_logprobs, events, head, usage


async def chat(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, whole or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    asked = parse_chat(data)
    model = find_model(fleet, asked.model)
    tools = usable_tools(asked)
    prompt = await asyncio.to_thread(conversation_ids, model, asked.messages, tools)
    form = tool_call_format(model.tokenizer.chat_template) if model.tokenizer and tools else None
    field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(asked, field)
    # Without a limit an answer may go on to the end of the model's context.
    max_tokens = max(1, model.max_model_len - len(prompt)) if limit is None else limit
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    names = {
        "grammar": "tools" if form else "response_format",
        "logprobs": "top_logprobs",
        "max_tokens": field,
        "prompt": "messages",
    }
    try:
        grammar = None if form is None else _tools_grammar(form, asked, tools)
        params = [
            asked.sampling(max_tokens=max_tokens, logprobs=logprobs, choice=choice, grammar=grammar)
            for choice in range(asked.n or 1)
        ]
        running = await start(fleet, model.name, [prompt], params)
    except InvalidRequest as error:
        raise in_words_of(error, names) from error
    choices = [_ChatChoice(asked, model.tokenizer, index, form) for index in range(len(params))]
    if asked.stream:
        beginning = head("chatcmpl", "chat.completion.chunk", model.name)
        first = [choice.chunk({"role": "assistant", "content": ""}) for choice in choices]
        return EventStream(
            events(
                running,
                beginning,
                lambda index, delta: choices[index].chunks(delta),
                first=first,
                include_usage=asked.include_usage,
            ),
            running,
        )
    beginning = head("chatcmpl", "chat.completion", model.name)
    try:
        outputs = await cancel_on_disconnect(request, running.outputs())
    except InvalidRequest as error:  # a grammar that could not be followed to its end
        raise in_words_of(error, names) from error
    finally:
        running.cancel()
    answers = [choice.whole(output) for choice, output in zip(choices, outputs, strict=True)]
    made = sum(len(output.token_ids) for output in outputs)
    counts = usage(running, made)
    return JSONResponse({**beginning, "choices": answers, "usage": counts})


def usable_tools(asked: ChatRequest) -> list[Tool]:
    """The tools that the model may call; with the choice `none` it is not told of any."""
    return [] if asked.tool_choice == "none" else list(asked.tools or ())


def conversation_ids(
    model: ModelLike,
    messages: list[ChatMessage],
    tools: list[Tool],
    *,
    more: bool = True,
    special: bool = False,
) -> list[int]:
    """A conversation through the model's own template, which brings its special tokens.

    Args:
      model: whose template is used.
      messages: the conversation.
      tools: those that the model is told of.
      more: end with the opening of the assistant's answer.
      special: add what the model expects around a text, beyond what its template has.

    Raises:
      ApiError, InvalidRequest: the model cannot take a conversation, or not this one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer: use /v1/completions", param="model")
    form = tool_call_format(tokenizer.chat_template)
    shown = [tool.for_template() for tool in tools]
    plain = template_messages(form, [message.for_template() for message in messages], shown)
    text = tokenizer.apply_chat(plain, more, shown if shown and form.native else None)
    return tokenizer.encode(text, add_special=special)


def _tools_grammar(form: ToolCallFormat, asked: ChatRequest, tools: list[Tool]) -> Grammar:
    parallel = asked.parallel_tool_calls is not False
    shown = [tool.for_template() for tool in tools]
    if isinstance(asked.tool_choice, NamedTool):
        name = asked.tool_choice.function.name
        named = [tool for tool in shown if tool["function"]["name"] == name]
        return tool_call_grammar(form, named, text=False, parallel=False)
    if asked.tool_choice == "required":
        return tool_call_grammar(form, shown, text=False, parallel=parallel)
    if asked.format_grammar is not None and not form.has_delimiters:
        raise ApiError(
            f"response_format with tools needs a tool_choice other than auto for {asked.model}, "
            "whose calls are JSON as well",
            param="response_format",
        )
    return tool_call_grammar(form, shown, text=asked.format_grammar or True, parallel=parallel)


class _ChatChoice:
    """One output as an assistant's message, whole or in events."""

    def __init__(
        self,
        asked: ChatRequest,
        tokenizer: TokenizerLike | None,
        index: int,
        form: ToolCallFormat | None,
    ) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._index = index
        self._reader = None if form is None else ToolCallParser(form)

    def whole(self, output: GeneratedOutput) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        content = output.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reader is not None:
            pieces = self._reader.push(output.text) + self._reader.flush()
            content = "".join(piece.text for piece in pieces)
            if self._reader.calls:
                message["content"] = content or None
                message["tool_calls"] = [
                    _call(call.id, call.name, call.arguments) for call in self._reader.calls
                ]
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(output),
            "finish_reason": self._reason(output.finish_reason),
        }

    def chunks(self, delta: DeltaLike) -> list[dict[str, Any]]:
        """Events for what was made, and an empty one that says why the output ended."""
        news = self._news(delta)
        logprobs = self._logprobs(delta) if delta.token_ids else None
        if logprobs is not None and not news:
            news = [{"content": ""}]
        chunks = []
        for part in news:
            chunks.append(self.chunk(part, logprobs))
            logprobs = None
        if delta.finish_reason:
            chunks.append(self.chunk({}, None, self._reason(delta.finish_reason)))
        return chunks

    def chunk(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """The choice of one event."""
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _news(self, delta: DeltaLike) -> list[dict[str, Any]]:
        if self._reader is None:
            return [{"content": delta.text}] if delta.text else []
        pieces = self._reader.push(delta.text)
        if delta.finish_reason:
            pieces += self._reader.flush()
        return [_part(piece) for piece in pieces]

    def _logprobs(self, made: DeltaLike | GeneratedOutput) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return chat_logprobs(self._tokenizer, list(made.token_ids), list(made.logprobs or ()))

    def _reason(self, reason: str | None) -> str | None:
        """As OpenAI's: `stop` for a function that the client named, which was no choice."""
        called = self._reader is not None and self._reader.calls
        if called and reason == "stop" and not isinstance(self._asked.tool_choice, NamedTool):
            return "tool_calls"
        return reason


def _part(piece: ParsedPiece) -> dict[str, Any]:
    """The delta of an event."""
    if piece.call is None:
        return {"content": piece.text}
    if piece.started is not None:
        call = {"index": piece.call, **_call(piece.started.id, piece.started.name, "")}
    else:
        call = {"index": piece.call, "function": {"arguments": piece.arguments}}
    return {"tool_calls": [call]}


def _call(number: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
