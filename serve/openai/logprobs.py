"""Log-probabilities in the formats of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.scheduling.steps import TokenLogprobs

_MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot represent; OpenAI's convention."""


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """Returns the printable text of a token; its id if the model has no tokenizer."""
    return f"token_id:{token}" if tokenizer is None else tokenizer.token_text(token)


def chat_logprobs(
    tokenizer: Tokenizer | None, tokens: list[int], logprobs: list[TokenLogprobs]
) -> dict[str, Any]:
    """Formats log-probabilities for chat completions: one entry per token, with alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": _finite(logprob),
            "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token)),
        }

    content = [
        {
            **entry(token, chosen.logprob),
            "top_logprobs": [entry(other, logprob) for other, logprob in chosen.top],
        }
        for token, chosen in zip(tokens, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None,
    tokens: list[int],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    alternatives: int,
    offsets: list[int],
) -> dict[str, Any]:
    """Formats log-probabilities for completions: four lists of equal length.

    As in OpenAI's API, the alternatives include the chosen token even if it is not one of the most
    likely. If two tokens have the same text, only the more likely token is shown.

    Args:
      tokenizer: provides the texts of tokens.
      tokens: the tokens of the output, or of one event.
      logprobs: one entry per token; None for the first token of a prompt.
      alternatives: requested number of alternatives; with 0 `top_logprobs` is null.
      offsets: where each token begins in the text, in characters.
    """
    texts = [token_text(tokenizer, token) for token in tokens]
    tops: list[dict[str, float] | None] = []
    for text, chosen in zip(texts, logprobs, strict=True):
        if chosen is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, logprob in chosen.top:
            top.setdefault(token_text(tokenizer, other), _finite(logprob))
        top.setdefault(text, _finite(chosen.logprob))
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": [
            None if chosen is None else _finite(chosen.logprob) for chosen in logprobs
        ],
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }


class TextOffsets:
    """Tracks where the tokens of one output begin in its text, in characters.

    Args:
      tokenizer: None for a model without a tokenizer, whose text is empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._stream = None if tokenizer is None else tokenizer.decode_stream()
        self._length = 0

    def advance(self, tokens: Sequence[int]) -> list[int]:
        """Returns the offsets of the next tokens.

        If a character spans several tokens, all of them have its offset.
        """
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            if self._stream is not None:
                self._length += len(self._stream.push([token]))
        return offsets


def _finite(logprob: float) -> float:
    return logprob if logprob > _MIN_LOGPROB else _MIN_LOGPROB
