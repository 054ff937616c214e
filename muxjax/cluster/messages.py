"""What goes between a router and a unit in another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import FinishReason, Request
from muxjax.scheduling.steps import TokenLogprobs


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A request on its way to the unit; the fields are those of `Request`.

    Attributes:
      waited: seconds since it arrived, as clocks of two machines differ.
      output: tokens that it has emitted before, on a unit that died.
    """

    id: int
    model: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    waited: float
    output: tuple[int, ...]

    @staticmethod
    def of(request: Request, now: float) -> AddRequest:
        """What a unit needs to know of a request."""
        return AddRequest(
            id=request.id,
            model=request.model,
            prompt=tuple(request.prompt),
            params=request.params,
            stop_ids=request.stop_ids,
            waited=now - request.arrival,
            output=tuple(request.output),
        )


class RequestEvent(NamedTuple):
    """What a step brought for one request. A tuple, since many are made.

    Attributes:
      id: the request's.
      tokens, logprobs, finish_reason: as in `RequestUpdate`.
      prompt_logprobs: with the first tokens, where they were asked for.
      cached_tokens: of the prompt, found in the prefix cache; with the first tokens.
      error: what the request ended with; nothing follows.
    """

    id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: Exception | None = None


class PollResult(NamedTuple):
    """All that has happened since the last report.

    Attributes:
      news: of requests, in order.
      stalled_seconds: how long the loop has had work and made no step.
      ended: what the loop has ended with, or None while it runs.
    """

    news: Sequence[RequestEvent]
    stalled_seconds: float
    ended: str | None
