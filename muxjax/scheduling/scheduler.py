"""The scheduler of one unit: request queues, KV pages, device-time shares, and steps.

A `Scheduler` builds steps and applies their results; its `Policy` chooses which model and phase
comes next. The loop around it, in the engine, the simulator and the tests, runs one step ahead of
the device:

    step = scheduler.next_step(now)  # assumes the most tokens that steps in flight can emit
    executor.poison(scheduler.take_freed_pages())  # test mode only
    handle = executor.submit(step)
    updates = scheduler.apply(previous_step, executor.result(previous_handle), now)

Call no other method of the scheduler between `next_step` and `submit`. Apply results in the order
of submission. `next_step` returns None if no step is possible before the next result.

Invariants:
- Requests of a model are admitted in order of arrival. A higher priority counts as an earlier
  arrival. A preempted request keeps its place; a deferred one goes to the end.
- `kv_cache.manager` allocates and frees pages, within the quotas of `kv_cache.quotas`.
- A request's pages are freed as soon as it ends or is preempted, even if steps in flight contain
  it: the device runs steps in order. It is resumed only when no step in flight contains it.
- Tokens that arrive for a preempted request are emitted. Tokens for an ended request are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from muxjax.errors import UnknownModel
from muxjax.sampling_params import HEAD_START
from muxjax.scheduling.admission import check_length, refuse_if_late
from muxjax.scheduling.apply_results import apply_prompt_logprobs, apply_tokens
from muxjax.scheduling.batch_builder import BatchBuilder
from muxjax.scheduling.demand import DemandFunction, equal_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.fair_share import StepKey
from muxjax.scheduling.kv_cache.manager import KVCacheManager
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.policies.interface import Defer, Policy, StepProposal
from muxjax.scheduling.requests import FinishReason, Request, RequestState, RequestUpdate
from muxjax.scheduling.specs import ModelSpec
from muxjax.scheduling.stats import model_stats, pool_stats
from muxjax.scheduling.steps import Prefill, Step, StepResult
from muxjax.scheduling.unit_models import UnitModels


class Scheduler(UnitModels):
    """Schedules the requests of one unit. Implements `SchedulerView`.

    Args:
      specs: the models.
      num_pages: number of pages in the pool.
      policy: chooses the steps; see `policies.registry.create_policy`.
      demand: expected demand of the models; called again every few seconds with newer estimates.
      estimates: step durations; measured durations are added to it.
      kv_quotas: division of the pool; `pool_division.OpenPool` does not divide it.
      concurrent: steps may end in any order, as in simulations of chips that run several programs
        at once. A request is then in at most one step in flight.
      refuse_late: refuse requests that cannot meet their model's SLO.
      prefix_cache: reuse the pages of prompts with a common prefix. Not possible with `concurrent`.
      record_freed: record freed pages for `take_freed_pages` (test mode).

    Raises:
      ValueError: no model, two models of one name, or `prefix_cache` with `concurrent`.
      PoolTooSmall: the pool cannot hold one request of full length of each model.

    Attributes:
      policy: as given.
      batch_builder: builds the steps.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        num_pages: int,
        policy: Policy,
        *,
        demand: DemandFunction = equal_demand,
        estimates: StepEstimates | None = None,
        kv_quotas: type[KVQuotas] = KVQuotas,
        concurrent: bool = False,
        refuse_late: bool = False,
        prefix_cache: bool = False,
        record_freed: bool = False,
    ) -> None:
        super().__init__(
            specs,
            num_pages,
            demand=demand,
            estimates=estimates,
            kv_quotas=kv_quotas,
            concurrent=concurrent,
            prefix_cache=prefix_cache,
            record_freed=record_freed,
        )
        self.policy = policy
        self._refuse_late = refuse_late
        self._kv_cache = KVCacheManager(
            self.models, self.allocator, self.quotas, self._prefixes, self._in_flight
        )
        self.batch_builder = BatchBuilder(
            self.models, self._in_flight, self._kv_cache, self._prefixes
        )
        self._requests: dict[int, Request] = {}
        self._num_ordered = 0

    # Requests

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          UnknownModel: the unit does not have the model.
          InvalidRequest: the prompt is empty, or leaves no room for an output token.
          Overloaded: with `refuse_late`, the request cannot meet its model's SLO.
          ValueError: its id is in use.
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
        """Ends a request as 'cancelled'. Returns False if it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.finish(request, "cancelled")
        return True

    def finish(self, request: Request, reason: FinishReason, now: float | None = None) -> None:
        """Ends a request, for example at a stop string. Its tokens in flight will be dropped.

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
        """Puts a waiting request behind all others of its model, at most once for each request.

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
        """Returns the request with this id; None if there is none or it has ended."""
        return self._requests.get(request_id)

    @property
    def num_requests(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    def _next_order(self, request: Request) -> int:
        """Returns the next place in the order of arrival, moved forward by the priority."""
        self._num_ordered += 1
        # The low bits repeat the count, so that all places are distinct.
        head_start = HEAD_START * (request.params.priority or 0)
        return ((self._num_ordered - head_start) << 40) + self._num_ordered

    # Methods for policies

    def backlog(self) -> tuple[list[StepKey], list[StepKey]]:
        """Returns the prefills and decodes that have work; see `SchedulerView.backlog`."""
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
        """Returns model and phase of each step in flight, oldest first."""
        return self._in_flight.step_keys()

    def may_prefill(self, model: str) -> bool:
        """Whether a model has a prefix to prefill and is not known to lack pages or slots."""
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
        """Builds the next step. Returns None if none is possible before the next result."""
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
          step: the oldest step in flight, or any step in flight if `concurrent`.
          result: its result.
          now: time at which its tokens count as emitted, in seconds.

        Returns:
          One update for each request that got tokens.

        Raises:
          ValueError: the step is out of order.
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
        """Returns the pages freed since the last call, to poison before the next step (tests)."""
        return self.allocator.take_freed_pages()

    # Stats and tests

    def stats(self) -> dict[str, Any]:
        """Returns counters of the unit and of each model; see `stats.py`."""
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
