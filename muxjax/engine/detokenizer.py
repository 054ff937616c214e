"""From the tokens of a request to the text its caller gets, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.scheduling.requests import FinishReason, RequestUpdate
from muxjax.scheduling.steps import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What a request has made since the last one.

    Attributes:
      text: may lag behind the tokens: half characters, and what may begin a stop string, wait.
      token_ids: new tokens; a stop token that ended the request is the last, with no text.
      logprobs: one entry for each of `token_ids`, or None if they were not asked for.
      finish_reason: 'stop', 'length', 'cancelled' or 'abort' in the last delta, None before.
      prompt_logprobs: in the first delta, if they were asked for: of the prompt's tokens from the
        second on.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Detokenizer:
    """Turns the updates of one request into deltas.

    Args:
      tokenizer: None for a model without one: the text stays empty.
      stop: strings that end the output, and are not part of it.
      min_tokens: before this many tokens no string ends the output.

    Attributes:
      cached_tokens: tokens of the prompt that the prefix cache had; known with the first delta.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], min_tokens: int = 0
    ) -> None:
        self._stream = None if tokenizer is None else tokenizer.decode_stream()
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._held = ""
        self._made = 0
        self.cached_tokens = 0

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings, so that text may end the request."""
        return bool(self._stop)

    def push(self, update: RequestUpdate) -> Delta:
        """The delta of an update. If its `finish_reason` is set and the update's is not, a stop
        string has ended the request, and the tokens after it are left out.
        """
        request = update.request
        prompt = None
        if self._made == 0:
            self.cached_tokens = request.cached_tokens
            if request.params.prompt_logprobs is not None:
                prompt = request.prompt_logprobs
        texts: list[str] = []
        for count, token in enumerate(update.tokens, start=1):
            self._made += 1
            if self._stream is None or token in request.stop_ids:
                continue
            text, stopped = self._advance(self._stream.push([token]))
            texts.append(text)
            if stopped:
                logprobs = None if update.logprobs is None else update.logprobs[:count]
                return Delta("".join(texts), update.tokens[:count], logprobs, "stop", prompt)
        reason = update.finish_reason
        if reason is not None and self._stream is not None:
            text, stopped = self._advance(self._stream.flush())
            texts.append(text)
            if stopped:
                reason = "stop"
            else:
                texts.append(self._held)
        return Delta("".join(texts), update.tokens, update.logprobs, reason, prompt)

    def _advance(self, text: str) -> tuple[str, bool]:
        """Adds text; returns what may be given out, and whether a stop string was met."""
        if not self._stop or self._made < self._min_tokens:
            return text, False
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            return text[: min(found)], True
        # Hold back the longest end that some stop string begins with.
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                self._held = text[-size:]
                return text[:-size], False
        return text, False
