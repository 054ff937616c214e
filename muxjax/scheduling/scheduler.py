"""The scheduler of one unit: request queues, KV pages, device-time shares, and steps.

A `Scheduler` builds steps and applies their results; its `Policy` chooses which model and phase
comes next. The loop around it, in the engine, the simulator and the tests, runs one step ahead of
the device:

    step = scheduler.next_step(now)              # counts on upper bounds of what is in flight
    executor.poison(scheduler.take_freed_pages())  # test mode only
    handle = executor.submit(step)
    updates = scheduler.apply(previous_step, executor.result(previous_handle), now)

Between `next_step` and `submit` nothing else may be called on the scheduler. Results are applied in
the order of submission. `next_step` returns None if no step is possible before the next result.

Invariants:
- Requests of a model are admitted in order of arrival, where a higher priority counts as an earlier
  arrival. A preempted request keeps its place; a deferred one goes to the end.
- `kv_cache.manager` allocates and frees pages, within the quotas of `kv_cache.quotas`.
- A request's pages are freed at once when it ends or is preempted, even while steps with it are in
  flight, since the device runs steps in order. It is prefilled again only when none is.
- Tokens that arrive for a preempted request are emitted, those for an ended one are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from muxjax.errors import PoolTooSmall, UnknownModel
from muxjax.sampling_params import HEAD_START
from muxjax.scheduling.admission import check_length, refuse_if_late
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
from muxjax.scheduling.policies.interface import Defer, Policy, StepProposal
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.scheduling.stats import model_stats, pool_stats
from muxjax.scheduling.steps import Prefill, Step, StepResult

SHARES_PERIOD = 3.0
"""Seconds between computations of the time shares from newer step estimates."""


def equal_demand(spec: ModelSpec, estimates: StepEstimates) -> Demand:
    """The same demand for every model, whatever its rate and lengths."""
    del spec, estimates
    return Demand(1.0, 1.0, 1.0)


class Scheduler:
    """State of one unit: a mesh and the models on it. Implements `SchedulerView`.

    Args:
      specs: the models.
      num_pages: number of pages in the pool.
      policy: chooses the steps; see `policies.registry.create_policy`.
      demand: expected demand of a model; called again every few seconds with newer estimates.
      estimates: step durations; measured durations are added to it.
      kv_quotas: how the pool is divided; `pool_division.OpenPool` does not divide it.
      concurrent: steps may end in any order (in simulations of chips that run several at once);
        a request is then in at most one step in flight.
      refuse_late: refuse requests that could not be served within their model's SLO.
      prefix_cache: reuse the pages of prompts with a common prefix. Not possible with `concurrent`,
        and of no use for made-up prompts.
      record_freed: record freed pages for `take_freed_pages` (test mode).

    Raises:
      ValueError: no model, two models of one name, or `prefix_cache` with `concurrent`.
      PoolTooSmall: the pool cannot hold one request of full length of each model.

    Attributes:
      models: state of each model, by name.
      policy: as given.
      estimates: as given.
      allocator: the pool's allocator.
      quotas: KV quotas and floors of the models.
      fair_share: shares of the device time.
      batch_builder: builds the steps.
      models_version: number of times that models were added, removed or updated.
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
            raise ValueError(f"a unit needs at least one model and distinct names, not {names}")
        if prefix_cache and concurrent:
            raise ValueError("concurrent steps may read a cached block before it is written")
        self.models = {spec.name: ModelState(spec) for spec in specs}
        self.policy = policy
        self.estimates = estimates or StepEstimates(names)
        self.allocator = _create_allocator(specs, num_pages, record_freed)
        self._in_flight = InFlightSteps(concurrent=concurrent)
        self._refuse_late = refuse_late
        self._demand = demand
        demands = {spec.name: demand(spec, self.estimates) for spec in specs}
        self.quotas = kv_quotas(specs, self.allocator, {name: demands[name].kv for name in names})
        self.fair_share = FairShare(names)
        self._set_shares(demands)
        self._next_shares: float | None = None
        self._prefixes = PrefixCache(self.models, self.allocator, self.quotas, prefix_cache)
        self._kv_cache = KVCacheManager(
            self.models, self.allocator, self.quotas, self._prefixes, self._in_flight
        )
        self.batch_builder = BatchBuilder(
            self.models, self._in_flight, self._kv_cache, self._prefixes
        )
        self.models_version = 0
        self._requests: dict[int, Request] = {}
        self._num_ordered = 0

    # Models

    def add_model(self, spec: ModelSpec) -> None:
        """Adds a model and divides the pool's quotas and the time's shares again.

        Raises:
          ValueError: the name is taken, or the model's blocks do not fit the pool's slabs.
          PoolTooSmall: the pool would not hold a request of full length of some model. Nothing is
            changed then.
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
        """Removes a model without requests; the others get its quota and its share of the time.

        Raises:
          ValueError: it has requests, or steps in flight.
        """
        if not self.is_idle(name):
            raise ValueError(f"{name} has requests, or steps in flight")
        self._divide([state.spec for state in self.models.values() if state.spec.name != name])
        self._prefixes.remove_model(name)
        self.allocator.remove_model(name)
        del self.models[name]

    def update_models(self, specs: Iterable[ModelSpec]) -> None:
        """Updates expected load, KV floors and SLOs of models; their shapes must stay the same.

        Raises:
          PoolTooSmall: the floors leave no room for a request of some model; nothing is changed.
        """
        updated = {state.spec.name: state.spec for state in self.models.values()}
        updated |= {spec.name: spec for spec in specs}
        self._divide(list(updated.values()))
        for spec in updated.values():
            self.models[spec.name].spec = spec

    def is_idle(self, name: str) -> bool:
        """Whether a model has neither requests nor steps in flight."""
        state = self.models[name]
        if state.has_prefill or state.has_decode:
            return False
        return all(model != name for model, _ in self._in_flight.step_keys())

    def _divide(self, specs: list[ModelSpec]) -> None:
        demands = {spec.name: self._demand(spec, self.estimates) for spec in specs}
        self.quotas.divide(specs, {name: demand.kv for name, demand in demands.items()})
        self.fair_share.set_models(demands)
        self._set_shares(demands)
        self.models_version += 1

    def _set_shares(self, demands: Mapping[str, Demand]) -> None:
        seconds: dict[StepKey, float] = {}
        for name, demand in demands.items():
            seconds[name, "prefill"] = demand.prefill_seconds
            seconds[name, "decode"] = demand.decode_seconds
        self.fair_share.set_demand(seconds)

    # Requests

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
        check_length(request, limit)
        request.max_new_tokens = min(request.params.max_tokens, limit - length)
        request.stop_set = frozenset(request.stop_ids)
        if self._refuse_late:
            refuse_if_late(self.estimates, state, request)
        request.order = self._next_order(request)
        self._requests[request.id] = request
        state.enqueue(request)
        state.prompt_tokens += length

    def cancel(self, request_id: int) -> bool:
        """Ends a request as 'cancelled'; False if it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.finish(request, "cancelled")
        return True

    def finish(self, request: Request, reason: FinishReason, now: float | None = None) -> None:
        """Ends a request, at a stop string for example; its tokens in flight will be dropped.

        Does nothing if the request has ended already.
        """
        if request.finished:
            return
        self._kv_cache.release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.finished_at = now
        self.models[request.model].finished += 1
        del self._requests[request.id]

    def defer(self, request: Request) -> None:
        """Puts a waiting request behind all others of its model, at most once in its life.

        Later requests go first until `recall` puts it back into the queue.
        """
        self._kv_cache.forget(request)
        self.models[request.model].defer(request)
        request.deferred = True

    def recall(self, model: str) -> None:
        """Puts the first of a model's deferred requests at the end of the model's queue."""
        request = next(iter(self.models[model].deferred.values()))
        request.order = self._next_order(request)
        self.models[model].recall(request)

    def get_request(self, request_id: int) -> Request | None:
        """The request with this id; None if there is none or it has ended."""
        return self._requests.get(request_id)

    @property
    def num_requests(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    def _next_order(self, request: Request) -> int:
        """The next place in the order of arrival, further to the front by the priority."""
        self._num_ordered += 1
        # The count is added once more in the low bits, so that all places are different.
        head_start = HEAD_START * (request.params.priority or 0)
        return ((self._num_ordered - head_start) << 40) + self._num_ordered

    # What policies read, besides the attributes

    def backlog(self) -> tuple[list[StepKey], list[StepKey]]:
        """Prefills and decodes that have work; see `SchedulerView.backlog`."""
        prefills: list[StepKey] = []
        decodes: list[StepKey] = []
        for state in self.models.values():
            if state.first is not None or state.prefilling:
                prefills.append(state.prefill_key)
            if state.running:
                decodes.append(state.decode_key)
        self.fair_share.set_active(prefills + decodes)
        return prefills, decodes

    def in_flight_keys(self) -> list[StepKey]:
        """Model and phase of each step in flight, oldest first."""
        return self._in_flight.step_keys()

    def may_prefill(self, model: str) -> bool:
        """Whether a model has a prefix to work on, and no known reason makes that impossible."""
        state = self.models[model]
        if state.prefilling:
            return True
        if state.first is None or not state.free_slots:
            return False
        return not self._kv_cache.refused(state)

    def is_settled(self, request: Request) -> bool:
        """Whether no step in flight contains the request."""
        return self._in_flight.is_settled(request)

    # Steps

    @property
    def num_in_flight(self) -> int:
        """Number of steps in flight."""
        return len(self._in_flight)

    def next_step(self, now: float) -> Step | None:
        """Builds the next step; None if none is possible before the next result arrives."""
        if not self.models:
            return None
        self._update_shares(now)
        policy, builder = self.policy, self.batch_builder
        built: tuple[Step, list[Request]] | None
        for proposal in policy.propose(self, now):
            if isinstance(proposal, StepProposal):
                model, phase, max_tokens = proposal
                if phase == "prefill":
                    built = builder.build_prefill(model, max_tokens)
                else:
                    built = builder.build_decode(model, max_tokens)
                if built is not None:
                    step, requests = built
                    policy.on_scheduled(self, step, now)
                    seconds = self.estimates.step_seconds(step)
                    key = model, phase
                    self.fair_share.charge(key, seconds)
                    self._in_flight.begin(step, key, seconds, requests)
                    return step
            elif isinstance(proposal, Defer):
                self.defer(proposal.request)
            else:
                self.recall(proposal.model)
        return None

    def apply(self, step: Step, result: StepResult, now: float) -> list[RequestUpdate]:
        """Applies the result of a step.

        Args:
          step: the oldest step in flight; any step in flight if `concurrent`.
          result: its result.
          now: time in seconds at which its tokens count as emitted.

        Returns:
          One update for each request that got tokens.

        Raises:
          ValueError: a step out of order.
        """
        entry = self._in_flight.end(step)
        self.fair_share.charge(entry.key, result.seconds - entry.seconds)
        state = self.models[step.model]
        if isinstance(step, Prefill):
            self.estimates.observe_prefill(step.model, step.num_tokens, result.seconds)
            if result.prompt_logprobs:
                apply_prompt_logprobs(self._requests, step, result)
        else:
            rounds = max(map(len, result.tokens), default=0)
            if rounds:
                batch = len(step.sequences)
                self.estimates.observe_decode(step.model, batch, rounds, result.seconds)
        updates, num_tokens = apply_tokens(entry.requests, result, now)
        state.output_tokens += num_tokens
        for request, _, _, reason in updates:
            if reason is not None:
                self.finish(request, reason, now)
        return updates

    def take_freed_pages(self) -> list[int]:
        """Returns pages freed since the last call (test mode), to poison before the next step."""
        return self.allocator.take_freed_pages()

    def _update_shares(self, now: float) -> None:
        """Moves KV quotas and computes the time shares again, each once in a period."""
        if self.quotas.due(now):
            self.quotas.move(now, [name for name, state in self.models.items() if state.waiting])
        if self._next_shares is None:
            self._next_shares = now + SHARES_PERIOD
        elif now >= self._next_shares:
            self._next_shares = now + SHARES_PERIOD
            demand, estimates = self._demand, self.estimates
            self._set_shares({n: demand(state.spec, estimates) for n, state in self.models.items()})

    # Stats and tests

    def stats(self) -> dict[str, Any]:
        """Counters of the unit and of each model; see `stats.py`."""
        return {
            "policy": self.policy.name,
            "requests": self.num_requests,
            **pool_stats(self.allocator, self.quotas, self.models.values()),
            "models": {
                name: model_stats(state, self.allocator, self.quotas, self.fair_share)
                for name, state in self.models.items()
            },
        }

    def check_invariants(self) -> None:
        """Raises AssertionError if pages, slots, queues or quotas are inconsistent."""
        self.allocator.check_invariants()
        self.quotas.check_invariants()
        self._kv_cache.check_invariants()
        self._prefixes.check_invariants()
        num_queued = 0
        for state in self.models.values():
            state.check_invariants()
            num_queued += len(state.waiting) + len(state.deferred)
            num_queued += len(state.prefilling) + len(state.running)
        assert num_queued == len(self._requests)


def _create_allocator(specs: list[ModelSpec], num_pages: int, record_freed: bool) -> SlabAllocator:
    deepest = max(specs, key=lambda spec: spec.num_layers)
    if num_pages < 2 * deepest.num_layers:
        raise PoolTooSmall(
            f"pool too small: {deepest.name} needs {deepest.num_layers} pages for one block and as "
            f"many for the dummy block, and there are {num_pages}; raise `pool.memory`"
        )
    layers = {spec.name: spec.num_layers for spec in specs}
    replicas = {spec.name: spec.replicas for spec in specs}
    return SlabAllocator(num_pages, layers, replicas, record_freed=record_freed)
