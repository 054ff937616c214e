"""A unit's state: what waits, what runs, and who holds which pages.

A `Unit` makes steps and takes in their results; what comes next is up to its `Policy`. The loop
around it, in the engine, the simulator and the tests, runs one step ahead of the device:

    step = unit.next_step(now)              # uses upper bounds for what is in flight
    executor.poison(unit.take_freed_pages())  # test mode only
    handle = executor.submit(step)
    updates = unit.apply(previous_step, executor.result(previous_handle), now)

Between `next_step` and `submit` nothing else may be called on the unit. Results are applied in the
order of submission. `next_step` returns None if nothing can be done before the next result.

Rules that hold throughout:
- requests of a model are admitted in order of arrival, with a head start for those of a higher
  priority; one that was preempted keeps its place, one that the policy defers goes to the end;
- pages are given and taken by `residency.py`, within the quotas of `quotas.py`;
- a request's pages are freed at once when it ends or is preempted, also while steps with it are in
  flight (the device runs steps in order); it is prefilled again only when none is;
- tokens that arrive for a preempted request are emitted, those for an ended one are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from muxjax.errors import InvalidRequest, PoolTooSmall, UnknownModel
from muxjax.sampling_params import HEAD_START
from muxjax.scheduling.admission import refuse_if_late
from muxjax.scheduling.allocator import SlabAllocator
from muxjax.scheduling.constraint import Constraint
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.prefix_cache import PrefixCache
from muxjax.scheduling.quotas import KVQuotas
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.residency import Residency
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.scheduling.steps import (
    Decode,
    DecodeBatch,
    Prefill,
    PrefillChunk,
    Step,
    StepResult,
    TokenLogprobs,
)
from muxjax.scheduling.time_quotas import TimeQuotas, Turn
from muxjax.scheduling.unit_stats import model_stats, pool_stats

SHARES_PERIOD = 3.0
"""Seconds between computations of the time shares from newer step estimates."""


def equal_demand(spec: ModelSpec, estimates: StepEstimates) -> Demand:
    """The same for every model, whatever its rate and lengths."""
    del spec, estimates
    return Demand(1.0, 1.0, 1.0)


@runtime_checkable
class Policy(Protocol):
    """Picks steps: calls `unit.make_prefill` and `unit.make_decode` and returns what they made."""

    @property
    def name(self) -> str:
        """The policy's name in the fleet file."""
        ...

    def next_step(self, unit: Unit, now: float) -> Step | None:
        """The next step, or None if no model has one that can be made now."""
        ...


@dataclass(slots=True)
class _Flight:
    """A step that was made and not applied: its number, what was charged for it, who is in it."""

    number: int
    step: Step
    turn: Turn
    seconds: float
    requests: list[Request]


class Unit:
    """Scheduler state of one mesh and the models on it.

    Args:
      specs: the models.
      num_pages: pages of the pool.
      policy: what picks the steps; see `policies.make_policy`.
      demand: expected needs, asked again every few seconds with the estimates of that time.
      estimates: step durations; measured ones are added to it.
      kv_quotas: how the pool is divided; `quotas.OpenPool` does not divide it.
      side_by_side: steps may end in any order (in simulations of chips that run several at once);
        the policy then puts no request into two steps in flight.
      refuse_late: refuse requests that could not be served within their model's targets.
      prefix_cache: find prefixes again that are in the pool. Not where steps run side by side, and
        not for prompts whose tokens mean nothing.
      record_freed: keep freed pages for `take_freed_pages` (test mode).

    Raises:
      PoolTooSmall: the pool cannot hold one request of full length of each model.

    Attributes:
      models: state of each model, by name.
      membership: how often models, or what is expected of them, have changed.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        num_pages: int,
        policy: Policy,
        *,
        demand: Callable[[ModelSpec, StepEstimates], Demand] = equal_demand,
        estimates: StepEstimates | None = None,
        kv_quotas: type[KVQuotas] = KVQuotas,
        side_by_side: bool = False,
        refuse_late: bool = False,
        prefix_cache: bool = False,
        record_freed: bool = False,
    ) -> None:
        specs = list(specs)
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) != len(names):
            raise ValueError(f"a unit needs at least one model and unlike names, not {names}")
        self.models = {spec.name: ModelState(spec) for spec in specs}
        self.policy = policy
        self.estimates = estimates or StepEstimates(names)
        self.allocator = _make_allocator(specs, num_pages, record_freed)
        self._side_by_side = side_by_side
        self._refuse_late = refuse_late
        self._demand = demand
        demands = {spec.name: demand(spec, self.estimates) for spec in specs}
        self.quotas = kv_quotas(specs, self.allocator, {name: demands[name].kv for name in names})
        self.time = TimeQuotas(names)
        self._set_shares(demands)
        self._next_shares: float | None = None
        if prefix_cache and side_by_side:
            raise ValueError("steps that run side by side may read a block before it is written")
        self._prefixes = PrefixCache(self.models, self.allocator, self.quotas, prefix_cache)
        self._residency = Residency(
            self.models, self.allocator, self.quotas, self._prefixes, self.settled
        )
        self.membership = 0
        self._requests: dict[int, Request] = {}
        self._added = 0
        self._in_flight: deque[_Flight] = deque()
        self._steps_made = 0
        self._in_step: list[Request] = []  # those in the step that is being made

    # Models that come and go

    def add_model(self, spec: ModelSpec) -> None:
        """Takes in a model: the pool's quotas and the time's shares are divided anew.

        Raises:
          ValueError: it is there already, or its blocks do not fit the pool as it is cut.
          PoolTooSmall: it would leave no room for a request of full length of some model. Nothing
            is changed then.
        """
        self.allocator.add_model(spec.name, spec.num_layers, spec.copies)
        self.estimates.add_model(spec.name)
        specs = [*(state.spec for state in self.models.values()), spec]
        try:
            self._divide(specs)
        except PoolTooSmall:
            self.allocator.remove_model(spec.name)
            raise
        self.models[spec.name] = ModelState(spec)
        self._prefixes.add_model(spec.name)

    def remove_model(self, name: str) -> None:
        """Drops a model without requests; its part of the pool and of the time goes to the others.

        Raises:
          ValueError: it has requests, or steps in flight.
        """
        if not self.idle(name):
            raise ValueError(f"{name} has requests, or steps in flight")
        self._divide([state.spec for state in self.models.values() if state.spec.name != name])
        self._prefixes.remove_model(name)
        self.allocator.remove_model(name)
        del self.models[name]

    def change_models(self, specs: Iterable[ModelSpec]) -> None:
        """Takes other expectations, floors and targets of models; their shapes must be the same.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model; nothing is changed.
        """
        changed = {state.spec.name: state.spec for state in self.models.values()}
        changed |= {spec.name: spec for spec in specs}
        self._divide(list(changed.values()))
        for spec in changed.values():
            self.models[spec.name].spec = spec

    def idle(self, name: str) -> bool:
        """Whether a model has neither requests nor steps in flight."""
        state = self.models[name]
        if state.has_prefill or state.has_decode:
            return False
        return all(flight.turn[0] != name for flight in self._in_flight)

    def _divide(self, specs: list[ModelSpec]) -> None:
        demands = {spec.name: self._demand(spec, self.estimates) for spec in specs}
        self.quotas.divide(specs, {name: demand.kv for name, demand in demands.items()})
        self.time.set_models(demands)
        self._set_shares(demands)
        self.membership += 1

    # Requests in and out

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          UnknownModel: the unit does not have the model.
          InvalidRequest: an empty prompt, or one that leaves no room for an output token.
          Overloaded: with `refuse_late`, it could not be served in time.
          ValueError: an id that is in use.
        """
        state = self.models.get(request.model)
        if state is None:
            raise UnknownModel(
                f"no model {request.model!r}; there are {', '.join(self.models)}", field="model"
            )
        if request.id in self._requests:
            raise ValueError(f"request id {request.id} is in use")
        length, limit = len(request.prompt), state.spec.max_model_len
        if length == 0:
            raise InvalidRequest("the prompt is empty", field="prompt")
        if length >= limit:
            raise InvalidRequest(
                f"the prompt has {length} tokens; {request.model} takes at most {limit - 1}, "
                f"which leaves one for the output",
                field="prompt",
            )
        request.max_new_tokens = min(request.params.max_tokens, limit - length)
        request.stop_set = frozenset(request.stop_ids)
        if self._refuse_late:
            refuse_if_late(self, state, request)
        request.order = self._place(request)
        self._requests[request.id] = request
        state.enqueue(request)
        state.prompt_tokens += length

    def cancel(self, request_id: int) -> bool:
        """Ends a request that is not wanted any more; False if it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.finish(request, "cancelled")
        return True

    def _place(self, request: Request) -> int:
        """The next place in line, those of a higher priority further to the front."""
        self._added += 1
        # The count itself comes last, so that no two are alike.
        head_start = HEAD_START * (request.params.priority or 0)
        return ((self._added - head_start) << 40) + self._added

    def finish(self, request: Request, reason: FinishReason, now: float | None = None) -> None:
        """Ends a request now, for a stop string say; what is in flight for it will be dropped.

        Does nothing if the request has ended already.
        """
        if request.finished:
            return
        self._residency.release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.finished_at = now
        self.models[request.model].finished += 1
        del self._requests[request.id]

    def defer(self, request: Request) -> None:
        """Puts a waiting request behind all others of its model, once in its life.

        Those that came later go first until `recall` brings it back, as if it had just come.
        """
        self._residency.forget(request)
        self.models[request.model].defer(request)
        request.deferred = True

    def recall(self, model: str) -> None:
        """Puts the first of a model's deferred requests back in line, at its end."""
        request = next(iter(self.models[model].deferred.values()))
        request.order = self._place(request)
        self.models[model].recall(request)

    def request(self, request_id: int) -> Request | None:
        """A request that has not ended."""
        return self._requests.get(request_id)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_in_flight(self) -> int:
        """Steps made and not applied."""
        return len(self._in_flight)

    def in_flight(self) -> list[Turn]:
        """The model and phase of each step made and not applied, in the order of making."""
        return [flight.turn for flight in self._in_flight]

    def may_prefill(self, model: str) -> bool:
        """Whether there is a prefix to work on, and no reason is known why it could not be."""
        state = self.models[model]
        if state.prefilling:
            return True
        if state.first is None or not state.free_slots:
            return False
        return not self._residency.refused(state)

    def settled(self, request: Request) -> bool:
        """Whether no step in flight works on the request."""
        last = request.last_step
        return all(flight.number != last for flight in self._in_flight)

    # The loop

    def next_step(self, now: float) -> Step | None:
        """The next step to submit, or None if none can be made before the next result arrives."""
        if not self.models:
            return None
        if self.quotas.due(now):
            self.quotas.move(now, [name for name, state in self.models.items() if state.waiting])
        if self._next_shares is None:
            self._next_shares = now + SHARES_PERIOD
        elif now >= self._next_shares:
            self._next_shares = now + SHARES_PERIOD
            self._set_shares(
                {
                    name: self._demand(state.spec, self.estimates)
                    for name, state in self.models.items()
                }
            )
        step = self.policy.next_step(self, now)
        if step is not None:
            self._steps_made += 1
            turn, seconds = self.expected_time(step)
            self.time.charge(turn, seconds)
            made = _Flight(self._steps_made, step, turn, seconds, self._in_step)
            self._in_flight.append(made)
            self._residency.steps_made = self._steps_made
        return step

    def apply(self, step: Step, result: StepResult, now: float) -> list[RequestUpdate]:
        """Takes in what a step gave.

        Args:
          step: the oldest step that was not applied yet; any such step if `side_by_side`.
          result: its result.
          now: seconds; the time at which its tokens count as emitted.

        Returns:
          One update for each request that got tokens.

        Raises:
          ValueError: a step out of order.
        """
        flight = self._take_from_flight(step)
        self.time.charge(flight.turn, result.seconds - flight.seconds)
        state = self.models[step.model]
        if isinstance(step, Prefill):
            self.estimates.observe_prefill(step.model, step.num_tokens, result.seconds)
            if result.prompt_logprobs:
                self._take_prompt_logprobs(step, result)
        else:
            rounds = max(map(len, result.tokens), default=0)
            if rounds:
                size = len(step.sequences)
                self.estimates.observe_decode(step.model, size, rounds, result.seconds)
        updates: list[RequestUpdate] = []
        finished, made = RequestState.FINISHED, 0
        new = tuple.__new__  # half the time of `RequestUpdate(...)`, of which there are hundreds
        for request, tokens, logprobs in zip(
            flight.requests, result.tokens, result.logprobs, strict=True
        ):
            if not tokens or request.state is finished:
                continue
            output, count = request.output, len(tokens)
            made += count
            if (
                output
                and request.constraint is None
                and len(output) + count < request.max_new_tokens
                and request.stop_set.isdisjoint(tokens)
            ):
                output += tokens
                update = new(RequestUpdate, (request, tokens, logprobs, None))
            else:
                update = self._take_first_or_last(request, tokens, logprobs, now)
            updates.append(update)
        state.output_tokens += made
        return updates

    def _take_from_flight(self, step: Step) -> _Flight:
        for index, flight in enumerate(self._in_flight):
            if flight.step is step:
                del self._in_flight[index]
                return flight
            if not self._side_by_side:
                break
        raise ValueError("steps must be applied in the order in which they were made")

    def take_freed_pages(self) -> list[int]:
        """Pages freed since the last call (test mode), to be poisoned before the next step."""
        return self.allocator.take_freed_pages()

    # Steps, for policies

    def make_prefill(self, model: str, max_tokens: int | None = None) -> Prefill | None:
        """Makes a prefill of a model's unfinished prefixes and of as many new ones as fit.

        The step counts as submitted: a policy returns what it made.

        Args:
          model: name.
          max_tokens: a limit below that of the model's buckets.

        Returns:
          The step, or None if no prefix can be worked on (none waits, no slot, no pages).
        """
        state = self.models[model]
        limits = state.spec.limits
        budget = limits.max_prefill_tokens
        if max_tokens is not None:
            budget = min(budget, max(1, max_tokens))
        chunks: list[PrefillChunk] = []
        self._in_step = []
        for request in list(state.prefilling.values()):
            if budget == 0 or len(chunks) == limits.max_prefill_seqs:
                break
            chunks.append(self._next_chunk(state, request, budget))
            budget -= len(chunks[-1].tokens)
        while budget > 0 and len(chunks) < limits.max_prefill_seqs:
            admitted = self._residency.admit(state)
            if admitted is None:
                break
            chunks.append(self._next_chunk(state, admitted, budget))
            budget -= len(chunks[-1].tokens)
        if not chunks:
            return None
        for request in self._in_step:
            self._prefixes.note_written(request)
        return Prefill(model, chunks)

    def make_decode(self, model: str, max_tokens: int | None = None) -> Decode | None:
        """Makes a decode of all of a model's sequences that may have tokens left to make.

        The step counts as submitted: a policy returns what it made. If pages are short, fewer
        tokens are made; if they are short for one token, requests are preempted; a sequence that
        gets no page nevertheless is left out. Where steps run side by side, so are sequences that
        a step in flight works on.

        A sequence that must follow a grammar is left out while a step in flight works on it, since
        what it may choose next is known only then. While there is one, steps are of one token for
        all, so that it gets its turn soon.

        Args:
          model: name.
          max_tokens: a limit below that of the model's buckets.

        Returns:
          The step, or None if there is no such sequence.
        """
        state = self.models[model]
        most = state.spec.limits.max_decode_tokens
        if max_tokens is not None:
            most = min(most, max(1, max_tokens))
        table = state.table
        left: np.ndarray = table.limit - table.made
        constrained = bool(table.constrained.any())
        if constrained:
            most = 1
        if self._in_flight and (self._side_by_side or constrained):
            busy = np.zeros(len(left), bool)
            for flight in self._in_flight:  # few, so that this is a third of `np.isin`
                busy |= table.last_step == flight.number
            left[busy if self._side_by_side else busy & table.constrained] = 0
        slots = left.nonzero()[0]
        if not slots.size:
            return None
        slots, counts, blocks = self._residency.grow(state, slots, min(most, int(left.max())))
        if not slots.size:
            return None
        table.made[slots] += counts
        table.last_step[slots] = self._steps_made + 1
        self._in_step = requests = table.requests[slots].tolist()
        masks = [_mask(request) for request in requests] if constrained else None
        batch = DecodeBatch(
            table.ids[slots], slots, table.blocks[slots].tolist(), blocks, counts, masks
        )
        return Decode(model, batch, int(counts.max()))

    # Parts of steps and results

    def _next_chunk(self, state: ModelState, request: Request, budget: int) -> PrefillChunk:
        start = request.dispatched
        end = min(request.prefix_tokens, start + budget)
        last = end == request.prefix_tokens
        request.dispatch(end, self._steps_made + 1)
        self._in_step.append(request)
        if last:
            state.start_decode(request)
        following: tuple[int, ...] = ()
        wanted = request.params.prompt_logprobs
        if wanted is not None and len(request.prompt_logprobs) < len(request.prompt) - 1:
            following = tuple(request.prompt[start + 1 : end + 1])
        return PrefillChunk(
            request_id=request.id,
            slot=request.slot,
            tokens=request.tokens_between(start, end),
            start=start,
            num_prompt_tokens=len(request.prompt),
            blocks=request.blocks,
            num_blocks=state.spec.blocks_for(end),
            sampling=request.params if last else None,
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
            mask=_mask(request) if last else None,
            following=following,
            prompt_logprobs=wanted or 0,
            found=request.found_tokens,
        )

    def _take_prompt_logprobs(self, step: Prefill, result: StepResult) -> None:
        for chunk, found in zip(step.chunks, result.prompt_logprobs, strict=True):
            request = self._requests.get(chunk.request_id)
            if request is not None and chunk.following:
                # A request that was preempted on the way begins anew.
                request.prompt_logprobs[chunk.start :] = found

    @staticmethod
    def _follow(constraint: Constraint, request: Request, token: int) -> FinishReason | None:
        """Advances a constraint; how the request ends, if it does."""
        try:
            return "stop" if constraint.advance(token) else None
        except InvalidRequest as error:
            request.error = error
            return "error"

    def _take_first_or_last(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None,
        now: float,
    ) -> RequestUpdate:
        """Takes tokens in that are a request's first, may end it, or must follow a grammar."""
        if request.first_token_at is None:
            request.first_token_at = now
        reason: FinishReason | None = None
        room = request.max_new_tokens - len(request.output)
        for index, token in enumerate(tokens, start=1):
            if token in request.stop_set:
                reason = "stop"
            elif index == room:
                reason = "length"
            else:
                continue
            if index < len(tokens):
                after = len(tokens) - index
                raise ValueError(f"request {request.id} got {after} tokens after its end")
        if request.constraint is not None and reason != "stop":
            reason = self._follow(request.constraint, request, tokens[-1]) or reason
        request.output += tokens
        if reason is not None:
            self.finish(request, reason, now)
        return RequestUpdate(request, tokens, logprobs, reason)

    def expected_time(self, step: Step) -> tuple[Turn, float]:
        """Whose time a step takes, and how many seconds as far as is known."""
        name = step.model
        if isinstance(step, Prefill):
            return (name, "prefill"), self.estimates.prefill(name, step.num_tokens)
        seconds = self.estimates.decode(name, len(step.sequences), step.num_tokens)
        return (name, "decode"), seconds

    def _set_shares(self, demands: Mapping[str, Demand]) -> None:
        needs: dict[Turn, float] = {}
        for name, demand in demands.items():
            needs[name, "prefill"] = demand.prefill_seconds
            needs[name, "decode"] = demand.decode_seconds
        self.time.set_needs(needs)

    # What is shown

    def stats(self) -> dict[str, Any]:
        """Counters of the unit and of each model; see `unit_stats.py`."""
        return {
            "policy": self.policy.name,
            "requests": self.num_requests,
            **pool_stats(self.allocator, self.quotas, self.models.values()),
            "models": {
                name: model_stats(state, self.allocator, self.quotas, self.time)
                for name, state in self.models.items()
            },
        }

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if pages, slots, queues or quotas do not agree."""
        self.allocator.check_invariants()
        self.quotas.check_invariants()
        self._residency.check_invariants()
        self._prefixes.check_invariants()
        queued = 0
        for state in self.models.values():
            state.check_invariants()
            queued += len(state.waiting) + len(state.deferred)
            queued += len(state.prefilling) + len(state.running)
        assert queued == len(self._requests)


def _mask(request: Request) -> np.ndarray | None:
    return None if request.constraint is None else request.constraint.mask


def _make_allocator(specs: list[ModelSpec], num_pages: int, record_freed: bool) -> SlabAllocator:
    largest = max(specs, key=lambda spec: spec.num_layers)
    if num_pages < 2 * largest.num_layers:
        raise PoolTooSmall(
            f"pool too small: {largest.name} needs {largest.num_layers} pages for one block and as "
            f"many for the dummy block, and there are {num_pages}; raise `pool.memory`"
        )
    layers = {spec.name: spec.num_layers for spec in specs}
    copies = {spec.name: spec.copies for spec in specs}
    return SlabAllocator(num_pages, layers, copies, record_freed=record_freed)
