"""The messages between a router and a unit in another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.requests import FinishReason, Request
from muxjax.scheduling.steps import TokenLogprobs


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A request for the unit; the other fields are those of `Request`.

    Attributes:
      waited: seconds since its arrival. A duration, because the clocks of two machines differ.
      output: tokens that it emitted on a unit that has failed.
    """

    id: int
    model: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    waited: float
    output: tuple[int, ...]

    @staticmethod
    def from_request(request: Request, now: float) -> AddRequest:
        """Returns the message for a request, at time `now` on the clock of its arrival."""
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
    """The result of a step for one request. A tuple, which is created faster than a dataclass.

    Attributes:
      id: of the request.
      tokens, logprobs, finish_reason: as in `RequestUpdate`.
      prompt_logprobs: if requested, with the first tokens.
      cached_tokens: prompt tokens found in the prefix cache; with the first tokens.
      error: if set, the request has failed, and this is its last event.
    """

    id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: Exception | None = None


class PollResult(NamedTuple):
    """The events since the last poll, and the state of the engine.

    Attributes:
      events: of requests, in order.
      stalled_seconds: seconds since the engine's last step while it has work.
      ended: why the engine has ended; None while it runs.
    """

    events: Sequence[RequestEvent]
    stalled_seconds: float
    ended: str | None
