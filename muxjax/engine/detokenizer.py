"""Turns the tokens of a request into text, and finds stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence

from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.outputs import Delta
from muxjax.scheduling.requests import RequestUpdate


class Detokenizer:
    """Turns the updates of one request into deltas.

    Args:
      tokenizer: None for a model without one: the text stays empty.
      stop: strings that end the output, and are not part of it.
      min_tokens: number of output tokens before which no stop string ends the output.

    Attributes:
      cached_tokens: prompt tokens read from the prefix cache; 0 before the first update.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], min_tokens: int = 0
    ) -> None:
        self._decoder = None if tokenizer is None else tokenizer.decode_stream()
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""
        self._num_tokens = 0
        self.cached_tokens = 0

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings, so that text may end the request."""
        return bool(self._stop)

    def push(self, update: RequestUpdate) -> Delta:
        """Returns the delta of an update.

        If only the delta has a `finish_reason`, a stop string has ended the request. The delta
        then omits the tokens after it.
        """
        request = update.request
        prompt_logprobs = None
        if self._num_tokens == 0:
            self.cached_tokens = request.cached_tokens
            if request.params.prompt_logprobs is not None:
                prompt_logprobs = request.prompt_logprobs
        texts: list[str] = []
        for count, token in enumerate(update.tokens, start=1):
            self._num_tokens += 1
            if self._decoder is None or token in request.stop_ids:
                continue
            text, stop = self._release(self._decoder.push([token]))
            texts.append(text)
            if stop is not None:
                logprobs = None if update.logprobs is None else update.logprobs[:count]
                return Delta(
                    "".join(texts), update.tokens[:count], logprobs, "stop", prompt_logprobs, stop
                )
        reason = update.finish_reason
        stop_reason: str | int | None = None
        if reason is not None:
            if reason == "stop" and update.tokens:
                last = update.tokens[-1]
                stop_reason = last if last in request.params.stop_token_ids else None
            if self._decoder is not None:
                text, stop = self._release(self._decoder.flush())
                texts.append(text)
                if stop is not None:
                    reason, stop_reason = "stop", stop
                else:
                    texts.append(self._held)
        return Delta(
            "".join(texts), update.tokens, update.logprobs, reason, prompt_logprobs, stop_reason
        )

    def _release(self, text: str) -> tuple[str, str | None]:
        """Adds text; returns the text to emit, and the stop string that ends the output."""
        if not self._stop or self._num_tokens < self._min_tokens:
            return text, None
        text = self._held + text
        self._held = ""
        matches = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            at, stop = min(matches, key=lambda match: match[0])
            return text[:at], stop
        # Hold back the longest end of the text that may begin a stop string.
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                self._held = text[-size:]
                return text[:-size], None
        return text, None
