"""Choice of the requests that are preempted when the pool is short.

Victims come first from models above their quota, the furthest above first, then from the model
furthest above its floor. Within a model, the youngest request is the first victim. The requests
that a model may preempt depend on the slabs that it would lease afterwards:

- Within its floor: requests of every model above its floor.
- Within its quota: requests of models above their quota. A running sequence may preempt them at
  once, a waiting request only after it has been blocked for some steps (`blocked_requests.py`).
- The first request of a model without pages, if it exceeds the quota: requests of models above
  their floor, after as many steps.
- Any other running sequence: only younger requests, of the same model and of models above their
  quota. If the sequence is the oldest request of the unit that holds pages, also of models above
  their floor.

The only request of a model counts as within its quota. It is preempted last, and only for a floor
or for the oldest request. Every model can therefore continue with one request, whatever its quota.

Every admitted request ends. The oldest request of the unit that holds pages (the *anchor*) is
preempted last, and may take all slabs that other models hold above their floors. The floors leave
room for its full length (`floors.py`): once the younger requests of the same model are preempted,
its slabs hold only its blocks. It therefore runs to its end, and another request becomes the
anchor. It cannot use blocks of another replica, but it can use slabs, which become free when the
requests of all replicas are preempted. Only a model below its floor may preempt the anchor, as a
last resort: when the blocks of the anchor are spread over more slabs than they need, and after its
prefill has generated a token.

A slab becomes free when no block in it is in use, and a shared block is in use until all requests
that refer to it are preempted. Plans are therefore computed on counters first, and a request is a
victim only if a slab, or a block that the requester can use, becomes free by it. Cached blocks
count as free (`allocator.py`): they are evicted before any request is preempted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.requests import Request, RequestState


def plan_preemption(
    allocator: SlabAllocator,
    quotas: KVQuotas,
    holders: Mapping[str, Sequence[Request]],
    model: str,
    slabs: int,
    requester: Request | None,
) -> list[Request] | None:
    """Chooses the requests to preempt so that a model can lease slabs.

    Args:
      allocator: the pool.
      quotas: floors and quotas.
      holders: requests that hold pages, by model, oldest first.
      model: the model that needs slabs.
      slabs: number of slabs that it must be able to lease.
      requester: the running sequence that needs one block; None to admit a waiting request. The
        caller checks whether that request may preempt others yet.

    Returns:
      The victims, or None if the rules of this module do not free enough. A victim of the
      requester's own model may free a block in a slab that the model keeps; then no slab is needed.
    """
    plan = _PreemptionPlan(allocator, quotas, holders, model, slabs, requester)
    return plan.victims if plan.find_victims() else None


class _PreemptionPlan:
    """Counters of the pool as if the victims so far were preempted."""

    def __init__(
        self,
        allocator: SlabAllocator,
        quotas: KVQuotas,
        holders: Mapping[str, Sequence[Request]],
        model: str,
        slabs: int,
        requester: Request | None,
    ) -> None:
        self._allocator = allocator
        self._quotas = quotas
        self._model = model
        self._slabs = slabs
        self._requester = requester
        self._remaining = {name: list(requests) for name, requests in holders.items()}
        self._leased = {name: allocator.leased_slabs(name) for name in holders}
        self._free = allocator.free_slabs
        self._freed_blocks: Counter[int] = Counter()  # by slab
        self._dropped_references: Counter[int] = Counter()  # by block
        oldest = [requests[0] for requests in self._remaining.values() if requests]
        self._anchor = min(oldest, key=lambda request: request.order, default=None)
        self._first_request = (
            requester is None and not self._leased[model] and slabs > quotas.quotas[model]
        )
        self.victims: list[Request] = []

    def find_victims(self) -> bool:
        """Adds victims until the model can lease its slabs; False if the rules do not allow it."""
        if self._find_victims(spare_anchor=True):
            return True
        # The blocks of the anchor may be spread over too many slabs for any floor to be met beside
        # it. It may be preempted once its prefill has generated a token, so that it makes progress;
        # its blocks are packed when it is admitted again.
        anchor = self._anchor
        last_resort = anchor is not None and anchor.state is RequestState.RUNNING
        return (
            last_resort
            and self._is_within(self._quotas.floors)
            and self._find_victims(spare_anchor=False)
        )

    def _find_victims(self, *, spare_anchor: bool) -> bool:
        while not self._has_enough():
            if not any(self._add_victims(name, spare_anchor) for name in self._victim_models()):
                return False
        return True

    def _has_enough(self) -> bool:
        """Whether the model could lease its slabs, by the rule of `KVQuotas.leasable`."""
        quotas, model = self._quotas, self._model
        within_quota = quotas.quotas[model] - self._leased[model]
        unfilled = sum(
            max(0, floor - self._leased[name])
            for name, floor in quotas.floors.items()
            if name != model
        )
        leasable = min(self._free, max(within_quota, self._free - unfilled, 0))
        return leasable >= self._slabs

    def _victim_models(self) -> list[str]:
        """Models whose requests may be preempted, first victim first."""
        floors, quotas = self._quotas.floors, self._quotas.quotas

        def rank(name: str) -> tuple[bool, int, int]:
            leased = self._leased[name]
            return (
                len(self._remaining[name]) == 1,
                -max(0, leased - quotas[name]),
                floors[name] - leased,
            )

        return sorted((name for name in self._remaining if self._may_preempt(name)), key=rank)

    def _may_preempt(self, name: str) -> bool:
        """Whether any request of this model may be preempted."""
        floors, quotas, model = self._quotas.floors, self._quotas.quotas, self._model
        if name == model:
            return self._requester is not None
        over_floor = self._leased[name] > floors[name]
        is_anchor = self._requester is not None and self._requester is self._anchor
        if self._is_within(floors) or is_anchor:
            return over_floor
        if len(self._remaining[name]) == 1:
            return False
        return over_floor if self._first_request else self._leased[name] > quotas[name]

    def _is_within(self, limits: Mapping[str, int]) -> bool:
        """Whether the model would be within its floor or quota with the slabs that it needs."""
        return self._leased[self._model] + self._slabs <= limits[self._model]

    def _may_preempt_older(self, name: str) -> bool:
        """Whether requests of this model that are older than the requester may be preempted."""
        if name == self._model:
            return False
        quotas = self._quotas.quotas
        if self._is_within(self._quotas.floors):
            return True
        return self._is_within(quotas) and self._leased[name] > quotas[name]

    def _add_victims(self, name: str, spare_anchor: bool) -> bool:
        """Adds the fewest of a model's youngest requests that free a slab or a usable block.

        Returns:
          Whether there are such requests; if not, none is added.
        """
        may_preempt_older = self._may_preempt_older(name)
        requester = self._requester
        freed_blocks = self._freed_blocks.copy()
        dropped = self._dropped_references.copy()
        candidates: list[Request] = []
        freed_slabs: set[int] = set()
        for request in reversed(self._remaining[name]):
            if request is requester or (spare_anchor and request is self._anchor):
                continue
            if not may_preempt_older and requester is not None and request.order < requester.order:
                break
            candidates.append(request)
            slabs: set[int] = set()  # those in which a block becomes free
            for block in request.blocks:
                dropped[block] += 1
                if dropped[block] < self._allocator.references(block):
                    continue
                slab = self._allocator.slab_of(block)
                slabs.add(slab)
                freed_blocks[slab] += 1
                if freed_blocks[slab] == self._allocator.used_blocks_in(slab):
                    freed_slabs.add(slab)
            if name == self._model and not slabs <= freed_slabs and self._same_replica(request):
                # The requester can use a free block in a slab that its model keeps.
                self._slabs = 0
                candidates = [other for other in candidates if self._same_replica(other)]
                self._commit(name, candidates, freed_slabs, freed_blocks, dropped)
                return True
            if freed_slabs:
                self._commit(name, candidates, freed_slabs, freed_blocks, dropped)
                return True
        return False

    def _same_replica(self, request: Request) -> bool:
        """Whether the requester can use blocks of this request of its model."""
        replica_of, requester = self._allocator.replica_of, self._requester
        return requester is not None and replica_of(request.blocks[0]) == replica_of(
            requester.blocks[0]
        )

    def _commit(
        self,
        name: str,
        candidates: list[Request],
        freed_slabs: set[int],
        freed_blocks: Counter[int],
        dropped: Counter[int],
    ) -> None:
        """Makes candidates victims, except those without a block in a freed slab."""
        if self._slabs:
            spared = [r for r in candidates if not self._holds_any(r, freed_slabs)]
            for request in spared:
                for block in request.blocks:
                    if dropped[block] == self._allocator.references(block):
                        freed_blocks[self._allocator.slab_of(block)] -= 1
                    dropped[block] -= 1
            candidates = [request for request in candidates if request not in spared]
        for request in candidates:
            self._remaining[name].remove(request)
        self.victims += candidates
        self._freed_blocks, self._dropped_references = freed_blocks, dropped
        self._leased[name] -= len(freed_slabs)
        self._free += len(freed_slabs)

    def _holds_any(self, request: Request, slabs: set[int]) -> bool:
        return any(self._allocator.slab_of(block) in slabs for block in request.blocks)
