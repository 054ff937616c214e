"""A request as the scheduler sees it."""

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
    """State of a request: WAITING -> PREFILL -> RUNNING -> FINISHED.

    Preemption leads back to WAITING. A waiting request may be DEFERRED behind all others of its
    model until it is recalled to WAITING.
    """

    WAITING = "waiting"
    DEFERRED = "deferred"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, its output, and its place in the scheduler.

    The caller sets the first seven fields, the scheduler owns the rest.

    There are two counts of output tokens. `len(output)` is what the host has read.
    `expected_tokens` is the upper bound once all steps in flight have arrived; decisions about
    pages and further steps use it. It and `last_step` are in the model's `SlotTable` while the
    request runs.

    Attributes:
      id: unique among the requests of a unit.
      model: the model's name.
      prompt: token ids.
      params: sampling parameters.
      stop_ids: tokens that end the request, including the model's unless they are ignored.
      arrival: arrival time, in seconds.
      constraint: grammar state of the output; belongs to the request, advanced by the scheduler.
      max_new_tokens: maximum number of tokens to generate; set when the request is added.
      order: place in the order of arrival over all models of the unit.
      output: emitted tokens, a stop id that ended the request included.
      state: see `RequestState`.
      finish_reason: why it ended, None before that.
      error: the error, with the finish reason 'error'.
      prompt_logprobs: log-probabilities of the prompt's tokens from the second on, as far as known.
      slot: the device slot it holds, -1 for none.
      blocks: first page of each block it holds. Replaced, never cleared, when the blocks are freed:
        steps in flight refer to the list.
      prefix_tokens: tokens to prefill since it was last admitted: the prompt and the tokens emitted
        before a preemption.
      dispatched: tokens of the prefix in the pool once all steps in flight have run.
      found_tokens: tokens of the prefix found in the pool when it was last admitted.
      findable_blocks: number of its blocks that other requests can find.
      block_keys: prefix-cache keys of its full blocks, as far as computed (`prefix_index.py`).
      cached_tokens: tokens of its prompt found in the pool when it was first admitted.
      table: the `SlotTable` of its model while it runs, else None.
      preemptions: number of times that it was preempted.
      deferred: whether it was ever deferred.
      first_token_at: time when its first token was read, in seconds.
      finished_at: time when it ended, in seconds.
      stop_set: `stop_ids` as a set; set when the request is added.
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
        """Upper bound of its output tokens once all steps in flight have arrived."""
        return self._expected if self.table is None else int(self.table.expected[self.slot])

    @property
    def pending(self) -> int:
        """Upper bound of the tokens in flight."""
        return self.expected_tokens - len(self.output)

    @property
    def last_step(self) -> int:
        """Number of the last step that contains it; 0 before the first."""
        return self._last_step if self.table is None else int(self.table.last_step[self.slot])

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def dispatch(self, end: int, step: int) -> None:
        """Notes that the step of this number extends the dispatched prefix to `end` tokens."""
        self.dispatched = end
        self._last_step = step
        if end == self.prefix_tokens:
            self._expected = len(self.output) + 1

    def bind_row(self, table: SlotTable) -> None:
        """Fills the table's row of its slot, which stores its counts until `unbind_row`."""
        slot = self.slot
        table.ids[slot] = self.id
        table.prompt[slot] = len(self.prompt)
        table.limit[slot] = self.max_new_tokens
        table.expected[slot] = self._expected
        table.num_blocks[slot] = len(self.blocks)
        table.last_step[slot] = self._last_step
        table.constrained[slot] = self.constraint is not None
        table.requests[slot] = self
        table.blocks[slot] = self.blocks
        self.table = table

    def unbind_row(self) -> None:
        """Clears its row and moves the counts back into the request.

        Raises:
          ValueError: it has no row.
        """
        table, slot = self.table, self.slot
        if table is None:
            raise ValueError(f"request {self.id} has no row")
        self._expected, self._last_step = self.expected_tokens, self.last_step
        table.limit[slot] = table.expected[slot] = 0
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
    """The tokens of one step for one request. A tuple, since hundreds are created a step.

    Attributes:
      request: the request, already updated.
      tokens: the new tokens. The last one may be a stop id, whose text is not part of the output.
      logprobs: one entry for each of `tokens`, or None if they were not requested.
      finish_reason: set in a request's last update: 'stop' after a stop id, or when the request's
        constraint is complete.
    """

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
