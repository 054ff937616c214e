"""One request as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.steps import TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled", "error", "abort"]


class RequestState(enum.Enum):
    """Where a request is: WAITING -> PREFILL -> RUNNING -> FINISHED; preemption leads back."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to its output. The first seven fields are given, the unit owns the rest.

    Two counts of output tokens matter: `len(output)`, what the host has read, and
    `expected_tokens`, what there may be once all steps in flight have arrived. Decisions about
    pages and further steps use the second.

    Attributes:
      id: unique among the requests of a unit.
      model: the model's name.
      prompt: token ids.
      params: sampling settings.
      stop_ids: tokens that end the request, the model's own included unless they are ignored.
      arrival: when it was asked for, in seconds.
      constraint: what the output must follow; its own, advanced by the unit.
      max_new_tokens: the most tokens to make; set when the request is added.
      order: place in the order of arrival over all models of the unit.
      output: emitted tokens, a stop id that ended the request included.
      state: see `RequestState`.
      finish_reason: why it ended, None before that.
      error: what went wrong, with the finish reason 'error'.
      prompt_logprobs: of the prompt's tokens from the second on, as far as they are known.
      slot: the device slot it holds, -1 for none.
      blocks: first page of each block it holds. Replaced, never cleared, when they are freed:
        steps in flight refer to the list.
      prefix_tokens: tokens to prefill in this residency (prompt and what was emitted before it).
      dispatched: how many of them are in steps submitted so far.
      pending: the most tokens that steps in flight may still bring.
      steps_in_flight: steps submitted and not yet applied that this request is in.
      preemptions: how often it lost its pages.
      first_token_at: when its first token was read, in seconds.
      finished_at: when it ended, in seconds.
    """

    id: int
    model: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    arrival: float = 0.0
    constraint: Constraint | None = None

    max_new_tokens: int = 0
    order: int = -1
    output: list[int] = field(default_factory=list)
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    prefix_tokens: int = 0
    dispatched: int = 0
    pending: int = 0
    steps_in_flight: int = 0
    preemptions: int = 0
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output that the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def expected_tokens(self) -> int:
        """The most output tokens there may be once all steps in flight have arrived."""
        return len(self.output) + self.pending

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def tokens_between(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens at positions `start` to `end - 1` of prompt and output."""
        boundary = len(self.prompt)
        if end <= boundary:
            return tuple(self.prompt[start:end])
        head = tuple(self.prompt[start:boundary]) if start < boundary else ()
        return head + tuple(self.output[max(0, start - boundary) : end - boundary])


class RequestUpdate(NamedTuple):
    """What one step brought for one request. A tuple, since many are made.

    Attributes:
      request: the request, already brought up to date.
      tokens: the new tokens. The last one may be a stop id, whose text is not part of the output.
      logprobs: one entry for each of `tokens`, or None if they were not asked for.
      finish_reason: set in a request's last update: 'stop' after a stop id, or when the request's
        constraint is complete.
    """

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
