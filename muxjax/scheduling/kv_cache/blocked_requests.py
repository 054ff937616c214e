"""Queue of blocked requests: waiting requests that were refused pages.

Each model has at most one, its first waiting request. Blocked requests of all models share one
queue with three classes:

- class 0: requests of models that have been blocked for at least `RECLAIM_STEPS` steps;
- class 1: all other requests, except
- class 2: requests that must borrow because their model's quota is full.

Within a class, requests are in order of arrival. While a request is in the queue, requests behind
it may not lease all slabs that become free. Admitting one of them must leave its model within its
quota, or within its floor if the request ahead exceeds the quota of its model. Running requests
end, so the first request in the queue is eventually admitted. A model that the policy has stopped
scheduling is skipped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request

RECLAIM_STEPS = 12
"""Steps for which a request is blocked before borrowers are preempted for its quota. Most borrowers
end earlier. A model must get its pages within 20 steps, including steps of other models."""
_RETRY_STEPS = 4
"""Steps until the next search for victims if there were none and no pages were freed."""


@dataclass(slots=True)
class BlockedRequest:
    """The first waiting request of a model, which was refused pages.

    Attributes:
      request: the request.
      since: number of steps built when its model was first blocked in class 1.
      last_checked: number of steps built when the policy last checked `is_blocked`.
      retry_at: number of steps built after which admission is retried even if nothing has changed.
      version: `BlockedRequests` version when its admission was last tried.
      slabs: slabs that it was refused.
      queue_class: 2 if it must borrow because its model's quota is full, else 1.
      over_quota: whether it alone needs more than its model's quota.
    """

    request: Request
    since: int
    last_checked: int
    retry_at: float
    version: int
    slabs: int
    queue_class: int
    over_quota: bool


class BlockedRequests:
    """The blocked requests of a unit, by model.

    Args:
      allocator: the pool.
      quotas: floors and quotas.
      in_flight: counts the steps built.

    Attributes:
      by_model: the blocked request of each model that has one. Read-only for other classes.
    """

    def __init__(
        self, allocator: SlabAllocator, quotas: KVQuotas, in_flight: InFlightSteps
    ) -> None:
        self._allocator = allocator
        self._quotas = quotas
        self._in_flight = in_flight
        self.by_model: dict[str, BlockedRequest] = {}
        self._releases: dict[str, int] = defaultdict(int)
        self._removals = 0

    def is_blocked(self, state: ModelState) -> bool:
        """Whether a model's first waiting request is blocked and nothing relevant has changed.

        Also records the check. While pages are short, this is called for every model before every
        step, so it must be fast.
        """
        name = state.spec.name
        blocked = self.by_model.get(name)
        if blocked is None:
            return False
        blocked.last_checked = num_steps = self._in_flight.started
        if blocked.request is not state.first or num_steps >= blocked.retry_at:
            return False
        # `_version`, inlined
        if blocked.version != self._releases[name] + self._removals + self._quotas.version:
            return False
        return blocked.slabs > self._quotas.leasable(name)

    def add(
        self,
        request: Request,
        slabs: int,
        *,
        queue_class: int,
        over_quota: bool,
        no_victims: bool,
    ) -> None:
        """Adds a request that was refused slabs, or updates it.

        Args:
          request: the first waiting request of its model.
          slabs: slabs that it was refused.
          queue_class: 1 or 2; see `BlockedRequest`.
          over_quota: whether it alone needs more than its model's quota.
          no_victims: whether preemption was permitted and would not have freed enough.
        """
        name, num_steps = request.model, self._in_flight.started
        earlier = self.by_model.get(name)
        overdue = earlier is not None and self._is_overdue(earlier)
        since = num_steps if earlier is None or earlier.queue_class == 2 else earlier.since
        retry_at = num_steps + _RETRY_STEPS if no_victims else math.inf
        if queue_class == 1 and not overdue:
            retry_at = min(retry_at, since + RECLAIM_STEPS)
        self.by_model[name] = BlockedRequest(
            request,
            since,
            num_steps,
            retry_at,
            self._version(name),
            slabs,
            queue_class,
            over_quota,
        )

    def remove(self, model: str) -> None:
        """Removes the blocked request of a model, if there is one."""
        if model in self.by_model:
            del self.by_model[model]
            self._removals += 1

    def forget(self, request: Request) -> None:
        """Removes a request, if it is blocked."""
        blocked = self.by_model.get(request.model)
        if blocked is not None and blocked.request is request:
            self.remove(request.model)

    def record_release(self, model: str) -> None:
        """Records that a request of the model has released its pages and slot."""
        self._releases[model] += 1

    def is_overdue(self, model: str) -> bool:
        """Whether the model has been blocked in class 1 for `RECLAIM_STEPS` steps."""
        blocked = self.by_model.get(model)
        return blocked is not None and self._is_overdue(blocked)

    def slab_limit(self, request: Request, queue_class: int) -> int:
        """Maximum number of slabs that a model may lease after a request of it is admitted.

        Args:
          request: the first waiting request of its model.
          queue_class: the class that the request has, or would have if it were blocked.
        """
        allocator, model = self._allocator, request.model
        limit = allocator.num_slabs
        if not self.by_model or allocator.free_slabs == limit:
            return limit
        quotas = self._quotas.quotas
        # A policy may run one step of each phase of every model before it checks again.
        patience = max(RECLAIM_STEPS, 2 * len(quotas))
        for name, blocked in self.by_model.items():
            if name == model or self._in_flight.started - blocked.last_checked > patience:
                continue
            other_class = 0 if self._is_overdue(blocked) else blocked.queue_class
            if (other_class, blocked.request.order) > (queue_class, request.order):
                continue
            if blocked.over_quota:
                return self._quotas.floors[model]
            limit = quotas[model]
        return limit

    def check_invariants(self, state: ModelState) -> None:
        """Raises AssertionError if the blocked request of a model does not wait."""
        blocked = self.by_model.get(state.spec.name)
        if blocked is not None:
            assert state.waiting.get(blocked.request.id) is blocked.request

    def _version(self, model: str) -> int:
        """Increases when a blocked request might be admitted although no more slabs are free."""
        return self._releases[model] + self._removals + self._quotas.version

    def _is_overdue(self, blocked: BlockedRequest) -> bool:
        return blocked.queue_class == 1 and self._in_flight.started - blocked.since >= RECLAIM_STEPS
