"""Renders conversations with a model's chat template, and reads tool calls from the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muxjax.errors import InvalidRequest
from muxjax.models.tokenizers.chat_tools import (
    ToolCallFormat,
    normalize_message,
    normalize_tool,
    template_messages,
    tool_call_format,
    tool_call_grammar,
)
from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.models.tokenizers.tool_call_parser import ToolCallParser
from muxjax.outputs import Completion
from muxjax.sampling_params import SamplingParams


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a prompt.

    Attributes:
      token_ids: the rendered conversation.
      params: sampling parameters; with tools, they include the grammar of tool calls.
      call_format: format of tool calls in the output; None without tools.
    """

    token_ids: list[int]
    params: SamplingParams
    call_format: ToolCallFormat | None

    @staticmethod
    def render(
        tokenizer: Tokenizer | None,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]],
    ) -> ChatPrompt:
        """Renders one conversation.

        Args:
          tokenizer: of the model; its chat template is used.
          messages: in the form of OpenAI's API.
          params: sampling parameters.
          tools: the functions that the model may call, in the form of OpenAI's API; may be empty.

        Raises:
          InvalidRequest: the model has no chat template, the template rejects the messages, a tool
            is not valid, or both `tools` and `params.grammar` are given.
        """
        if tokenizer is None:
            raise InvalidRequest(
                "this model has no tokenizer: use generate with token ids", field="messages"
            )
        call_format = tool_call_format(tokenizer.chat_template)
        tools = [normalize_tool(tool) for tool in tools]
        normalized = [normalize_message(message) for message in messages]
        text = tokenizer.apply_chat(
            template_messages(call_format, normalized, tools),
            tools=tools if tools and call_format.native else None,
        )
        # The template adds the special tokens.
        token_ids = tokenizer.encode(text, add_special=False)
        if not tools:
            return ChatPrompt(token_ids, params, None)
        if params.grammar is not None:
            raise InvalidRequest(
                "tools and params.grammar cannot be combined: remove one of them",
                field="grammar",
            )
        grammar = tool_call_grammar(call_format, tools, text=True, parallel=True)
        return ChatPrompt(token_ids, dataclasses.replace(params, grammar=grammar), call_format)

    def parse_calls(self, completion: Completion) -> Completion:
        """Returns the completion with its tool calls moved from `text` to `tool_calls`."""
        if self.call_format is None:
            return completion
        parser = ToolCallParser(self.call_format)
        pieces = parser.push(completion.text) + parser.flush()
        text = "".join(piece.text for piece in pieces)
        return dataclasses.replace(completion, text=text, tool_calls=parser.calls)
