"""`/v1/chat/completions`: generates the assistant's next message of a conversation."""

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
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.models.tokenizers.tool_call_parser import ParsedPiece, ToolCallParser
from muxjax.outputs import Delta
from muxjax.serve.errors import ApiError, rename_field
from muxjax.serve.find_model import find_model
from muxjax.serve.fleet_protocol import FleetLike, ModelLike
from muxjax.serve.openai.event_stream import EventStream
from muxjax.serve.openai.generation import GeneratedOutput, cancel_on_disconnect, start_generation
from muxjax.serve.openai.logprobs import chat_logprobs
from muxjax.serve.openai.messages import ChatMessage, NamedTool, Tool
from muxjax.serve.openai.requests import ChatRequest, parse_chat
from muxjax.serve.openai.responses import response_header, usage_counts


async def chat(fleet: FleetLike, request: Request, data: dict[str, Any]) -> Response:
    """Answers one call, in one response or as server-sent events.

    Raises:
      ApiError, MuxError: the call cannot be served.
    """
    body = parse_chat(data)
    model = find_model(fleet, body.model)
    tools = usable_tools(body)
    prompt = await asyncio.to_thread(encode_conversation, model, body.messages, tools)
    call_format = None
    if model.tokenizer is not None and tools:
        call_format = tool_call_format(model.tokenizer.chat_template)
    limit_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, limit_field)
    # Without a limit, the output may extend to the end of the model's context.
    max_tokens = max(1, model.max_model_len - len(prompt)) if limit is None else limit
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    field_names = {
        "grammar": "tools" if call_format else "response_format",
        "logprobs": "top_logprobs",
        "max_tokens": limit_field,
        "prompt": "messages",
    }
    try:
        grammar = None if call_format is None else _tool_grammar(call_format, body, tools)
        params = [
            body.sampling_params(
                max_tokens=max_tokens, logprobs=logprobs, choice=choice, grammar=grammar
            )
            for choice in range(body.n or 1)
        ]
        call = await start_generation(fleet, model.name, [prompt], params)
    except InvalidRequest as error:
        raise rename_field(error, field_names) from error
    choices = [
        _ChatChoice(body, model.tokenizer, index, call_format) for index in range(len(params))
    ]
    if body.stream:
        return EventStream(
            call,
            response_header("chatcmpl", "chat.completion.chunk", model.name),
            lambda index, delta: choices[index].chunks(delta),
            first_choices=[
                choice.chunk({"role": "assistant", "content": ""}) for choice in choices
            ],
            include_usage=body.include_usage,
        )
    header = response_header("chatcmpl", "chat.completion", model.name)
    try:
        outputs = await cancel_on_disconnect(request.receive, call.collect())
    except InvalidRequest as error:  # the output cannot satisfy its grammar
        raise rename_field(error, field_names) from error
    finally:
        call.cancel()
    formatted = [choice.format(output) for choice, output in zip(choices, outputs, strict=True)]
    generated = sum(len(output.token_ids) for output in outputs)
    return JSONResponse({**header, "choices": formatted, "usage": usage_counts(call, generated)})


def usable_tools(body: ChatRequest) -> list[Tool]:
    """Returns the tools that the model may call; none with the tool choice `none`."""
    return [] if body.tool_choice == "none" else list(body.tools or ())


def encode_conversation(
    model: ModelLike,
    messages: list[ChatMessage],
    tools: list[Tool],
    *,
    add_generation_prompt: bool = True,
    add_special: bool = False,
) -> list[int]:
    """Renders a conversation with the model's chat template and encodes it.

    Args:
      model: provides the chat template and the tokenizer.
      messages: the conversation.
      tools: tools that are described to the model.
      add_generation_prompt: whether the prompt ends with the start of the assistant's message.
      add_special: whether the tokenizer adds special tokens besides the template's.

    Raises:
      ApiError, InvalidRequest: the model has no chat template, or it rejects the conversation.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer: use /v1/completions", param="model")
    call_format = tool_call_format(tokenizer.chat_template)
    plain_tools = [tool.for_template() for tool in tools]
    plain_messages = template_messages(
        call_format, [message.for_template() for message in messages], plain_tools
    )
    text = tokenizer.apply_chat(
        plain_messages,
        add_generation_prompt,
        plain_tools if plain_tools and call_format.native else None,
    )
    return tokenizer.encode(text, add_special=add_special)


def _tool_grammar(call_format: ToolCallFormat, body: ChatRequest, tools: list[Tool]) -> Grammar:
    """Builds the grammar that the tool choice prescribes."""
    parallel = body.parallel_tool_calls is not False
    plain_tools = [tool.for_template() for tool in tools]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        named = [tool for tool in plain_tools if tool["function"]["name"] == name]
        return tool_call_grammar(call_format, named, text=False, parallel=False)
    if body.tool_choice == "required":
        return tool_call_grammar(call_format, plain_tools, text=False, parallel=parallel)
    if body.format_grammar is not None and not call_format.has_delimiters:
        raise ApiError(
            f"response_format with tools needs a tool_choice other than auto for {body.model}, "
            "because its tool calls are JSON too",
            param="response_format",
        )
    text = body.format_grammar or True
    return tool_call_grammar(call_format, plain_tools, text=text, parallel=parallel)


class _ChatChoice:
    """Formats one output as an assistant message, complete or in chunks."""

    def __init__(
        self,
        body: ChatRequest,
        tokenizer: Tokenizer | None,
        index: int,
        call_format: ToolCallFormat | None,
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._index = index
        self._parser = None if call_format is None else ToolCallParser(call_format)

    def format(self, output: GeneratedOutput) -> dict[str, Any]:
        """Formats a complete output."""
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        if self._parser is not None:
            pieces = self._parser.push(output.text) + self._parser.flush()
            if self._parser.calls:
                message["content"] = "".join(piece.text for piece in pieces) or None
                message["tool_calls"] = [
                    _tool_call(call.id, call.name, call.arguments) for call in self._parser.calls
                ]
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(output),
            "finish_reason": self._finish_reason(output.finish_reason),
        }

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Formats a delta. The finish reason is sent in a chunk without content."""
        parts = self._message_deltas(delta)
        logprobs = self._logprobs(delta) if delta.token_ids else None
        if logprobs is not None and not parts:
            parts = [{"content": ""}]
        chunks = []
        for part in parts:
            chunks.append(self.chunk(part, logprobs))
            logprobs = None
        if delta.finish_reason:
            chunks.append(self.chunk({}, None, self._finish_reason(delta.finish_reason)))
        return chunks

    def chunk(
        self,
        message_delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """Builds the choice of one event."""
        return {
            "index": self._index,
            "delta": message_delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _message_deltas(self, delta: Delta) -> list[dict[str, Any]]:
        if self._parser is None:
            return [{"content": delta.text}] if delta.text else []
        pieces = self._parser.push(delta.text)
        if delta.finish_reason:
            pieces += self._parser.flush()
        return [_message_delta(piece) for piece in pieces]

    def _logprobs(self, output: Delta | GeneratedOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._tokenizer, list(output.token_ids), list(output.logprobs or ()))

    def _finish_reason(self, reason: str | None) -> str | None:
        """`tool_calls` if the model chose to call a tool; `stop` if the client named the tool."""
        called = self._parser is not None and self._parser.calls
        if called and reason == "stop" and not isinstance(self._body.tool_choice, NamedTool):
            return "tool_calls"
        return reason


def _message_delta(piece: ParsedPiece) -> dict[str, Any]:
    if piece.call is None:
        return {"content": piece.text}
    if piece.started is not None:
        call = {"index": piece.call, **_tool_call(piece.started.id, piece.started.name, "")}
    else:
        call = {"index": piece.call, "function": {"arguments": piece.arguments}}
    return {"tool_calls": [call]}


def _tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
