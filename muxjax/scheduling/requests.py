"""One request as the scheduler sees it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.slot_table import SlotTable
from muxjax.scheduling.steps import TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled", "error", "abort"]


class RequestState(enum.Enum):
    """Where a request is: WAITING -> PREFILL -> RUNNING -> FINISHED; preemption leads back.

    One that waits may be DEFERRED: others go first, until it waits again.
    """

    WAITING = "waiting"
    DEFERRED = "deferred"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to its output. The first seven fields are given, the unit owns the rest.

    Two counts of output tokens matter: `len(output)`, what the host has read, and
    `expected_tokens`, what there may be once all steps in flight have arrived. Decisions about
    pages and further steps use the second. It and `last_step` are kept in the model's `SlotTable`
    while the request runs.

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
      dispatched: how many of them are in the pool once the steps submitted so far have run.
      found_tokens: how many of them were found there when it was admitted.
      findable_blocks: how many of its blocks others may find.
      block_keys: of its full blocks, as far as they were asked for (`prefix_index.py`).
      cached_tokens: tokens of its prompt that were found when it was first admitted.
      table: where its row is while it runs.
      preemptions: how often it lost its pages.
      deferred: whether it was once put behind those that came later.
      first_token_at: when its first token was read, in seconds.
      finished_at: when it ended, in seconds.
      stop_set: `stop_ids` again, quick to ask; set when the request is added.
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
    found_tokens: int = 0
    findable_blocks: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    table: SlotTable | None = None
    preemptions: int = 0
    deferred: bool = False
    first_token_at: float | None = None
    finished_at: float | None = None
    stop_set: frozenset[int] = frozenset()
    _expected: int = field(default=0, init=False)
    _last_step: int = field(default=0, init=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output that the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def expected_tokens(self) -> int:
        """The most output tokens there may be once all steps in flight have arrived."""
        return self._expected if self.table is None else int(self.table.made[self.slot])

    @property
    def pending(self) -> int:
        """The most tokens that steps in flight may still bring."""
        return self.expected_tokens - len(self.output)

    @property
    def last_step(self) -> int:
        """The number of the last step made that it is in; 0 before the first."""
        return self._last_step if self.table is None else int(self.table.last_step[self.slot])

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def dispatch(self, end: int, step: int) -> None:
        """Notes that the step of this number brings the prefix up to `end`."""
        self.dispatched = end
        self._last_step = step
        if end == self.prefix_tokens:
            self._expected = len(self.output) + 1

    def take_row(self, table: SlotTable) -> None:
        """Fills the row of its slot; from now on the counts are kept there."""
        slot = self.slot
        table.ids[slot] = self.id
        table.prompt[slot] = len(self.prompt)
        table.limit[slot] = self.max_new_tokens
        table.made[slot] = self._expected
        table.num_blocks[slot] = len(self.blocks)
        table.last_step[slot] = self._last_step
        table.constrained[slot] = self.constraint is not None
        table.requests[slot] = self
        table.blocks[slot] = self.blocks
        self.table = table

    def leave_row(self) -> None:
        """Gives the row up and takes the counts back."""
        table, slot = self.table, self.slot
        if table is None:
            raise ValueError(f"request {self.id} has no row")
        self._expected, self._last_step = self.expected_tokens, self.last_step
        table.limit[slot] = table.made[slot] = 0
        table.constrained[slot] = False
        table.requests[slot] = table.blocks[slot] = None
        self.table = None

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
