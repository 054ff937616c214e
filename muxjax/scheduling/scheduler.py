"""A unit's state: what waits, what runs, and who holds which pages.

A `Scheduler` makes steps and takes in their results; what comes next is up to its `Policy`. The
loop around it, in the engine, the simulator and the tests, runs one step ahead of the device:

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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from muxjax.errors import InvalidRequest, PoolTooSmall, UnknownModel
from muxjax.sampling_params import HEAD_START
from muxjax.scheduling.admission import refuse_if_late
from muxjax.scheduling.apply_results import apply_prompt_logprobs, apply_tokens
from muxjax.scheduling.batch_builder import BatchBuilder
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.fair_share import FairShare, StepKey
from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.manager import KVCacheManager
from muxjax.scheduling.kv_cache.prefix_cache import PrefixCache
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.scheduling.stats import model_stats, pool_stats
from muxjax.scheduling.steps import Decode, Prefill, Step, StepResult

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

    def next_step(self, unit: Scheduler, now: float) -> Step | None:
        """The next step, or None if no model has one that can be made now."""
        ...


class Scheduler:
    """Scheduler state of one mesh and the models on it.

    Args:
      specs: the models.
      num_pages: pages of the pool.
      policy: what picks the steps; see `policies.make_policy`.
      demand: expected needs, asked again every few seconds with the estimates of that time.
      estimates: step durations; measured ones are added to it.
      kv_quotas: how the pool is divided; `pool_division.OpenPool` does not divide it.
      concurrent: steps may end in any order (in simulations of chips that run several at once);
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
        concurrent: bool = False,
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
        self._flights = InFlightSteps(concurrent=concurrent)
        self._refuse_late = refuse_late
        self._demand = demand
        demands = {spec.name: demand(spec, self.estimates) for spec in specs}
        self.quotas = kv_quotas(specs, self.allocator, {name: demands[name].kv for name in names})
        self.time = FairShare(names)
        self._set_shares(demands)
        self._next_shares: float | None = None
        if prefix_cache and concurrent:
            raise ValueError("steps that run side by side may read a block before it is written")
        self._prefixes = PrefixCache(self.models, self.allocator, self.quotas, prefix_cache)
        self._residency = KVCacheManager(
            self.models, self.allocator, self.quotas, self._prefixes, self._flights
        )
        self._maker = BatchBuilder(self.models, self._flights, self._residency, self._prefixes)
        self.membership = 0
        self._requests: dict[int, Request] = {}
        self._added = 0

    # Models that come and go

    def add_model(self, spec: ModelSpec) -> None:
        """Takes in a model: the pool's quotas and the time's shares are divided anew.

        Raises:
          ValueError: it is there already, or its blocks do not fit the pool as it is cut.
          PoolTooSmall: it would leave no room for a request of full length of some model. Nothing
            is changed then.
        """
        self.allocator.add_model(spec.name, spec.num_layers, spec.replicas)
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
        return all(model != name for model, _ in self._flights.turns())

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
        return len(self._flights)

    def in_flight(self) -> list[StepKey]:
        """The model and phase of each step made and not applied, in the order of making."""
        return self._flights.turns()

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
        return self._flights.settled(request)

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
            turn, seconds = self.expected_time(step)
            self.time.charge(turn, seconds)
            self._flights.begin(step, turn, seconds, self._maker.requests)
        return step

    def apply(self, step: Step, result: StepResult, now: float) -> list[RequestUpdate]:
        """Takes in what a step gave.

        Args:
          step: the oldest step that was not applied yet; any such step if `concurrent`.
          result: its result.
          now: seconds; the time at which its tokens count as emitted.

        Returns:
          One update for each request that got tokens.

        Raises:
          ValueError: a step out of order.
        """
        flight = self._flights.end(step)
        self.time.charge(flight.turn, result.seconds - flight.seconds)
        state = self.models[step.model]
        if isinstance(step, Prefill):
            self.estimates.observe_prefill(step.model, step.num_tokens, result.seconds)
            if result.prompt_logprobs:
                apply_prompt_logprobs(self._requests, step, result)
        else:
            rounds = max(map(len, result.tokens), default=0)
            if rounds:
                size = len(step.sequences)
                self.estimates.observe_decode(step.model, size, rounds, result.seconds)
        updates, made = apply_tokens(flight.requests, result, now)
        state.output_tokens += made
        for request, _, _, reason in updates:
            if reason is not None:
                self.finish(request, reason, now)
        return updates

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
        return self._maker.prefill(model, max_tokens)

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
        return self._maker.decode(model, max_tokens)

    # Time

    def expected_time(self, step: Step) -> tuple[StepKey, float]:
        """Whose time a step takes, and how many seconds as far as is known."""
        name = step.model
        if isinstance(step, Prefill):
            return (name, "prefill"), self.estimates.prefill(name, step.num_tokens)
        seconds = self.estimates.decode(name, len(step.sequences), step.num_tokens)
        return (name, "decode"), seconds

    def _set_shares(self, demands: Mapping[str, Demand]) -> None:
        needs: dict[StepKey, float] = {}
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


def _make_allocator(specs: list[ModelSpec], num_pages: int, record_freed: bool) -> SlabAllocator:
    largest = max(specs, key=lambda spec: spec.num_layers)
    if num_pages < 2 * largest.num_layers:
        raise PoolTooSmall(
            f"pool too small: {largest.name} needs {largest.num_layers} pages for one block and as "
            f"many for the dummy block, and there are {num_pages}; raise `pool.memory`"
        )
    layers = {spec.name: spec.num_layers for spec in specs}
    replicas = {spec.name: spec.replicas for spec in specs}
    return SlabAllocator(num_pages, layers, replicas, record_freed=record_freed)
