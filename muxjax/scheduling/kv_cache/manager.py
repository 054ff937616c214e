"""KV cache manager: admission, growth, preemption and release of requests.

A request is admitted if there are pages for its whole prefix and a first decode burst, plus a burst
for each running sequence of its model, which would otherwise soon preempt it. Running sequences
grow by blocks. If pages are short, `preemption.py` chooses the requests to preempt.

A waiting request that is refused pages is blocked (`blocked_requests.py`).

Borrowed pages are reclaimed in three ways:

- at once, for a request that leaves its model within its floor;
- after `RECLAIM_STEPS` steps, for a request that leaves its model within its quota, from models
  above theirs;
- after as many steps, for the first request of a model without pages, if it exceeds the model's
  floor and quota, from models above their floors. Each model with a floor therefore runs at least
  one request.

The oldest request of the unit keeps its pages even then; see `preemption.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.blocked_requests import BlockedRequests
from muxjax.scheduling.kv_cache.growth import append_blocks, plan_growth
from muxjax.scheduling.kv_cache.preemption import plan_preemption
from muxjax.scheduling.kv_cache.prefix_cache import CachedPrefix, PrefixCache
from muxjax.scheduling.kv_cache.quota_records import ReclaimReason
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.specs import ModelSpec


class KVCacheManager:
    """Assigns pages and slots to requests and releases them, within the quotas.

    Args:
      models: state of each model. The manager moves requests between the groups of a state.
      allocator: the pool.
      quotas: floors and quotas.
      prefixes: the prefix cache.
      in_flight: steps in flight; counts the steps built.

    Attributes:
      refused: whether a model's first waiting request is blocked; `BlockedRequests.is_blocked`.
    """

    def __init__(
        self,
        models: Mapping[str, ModelState],
        allocator: SlabAllocator,
        quotas: KVQuotas,
        prefixes: PrefixCache,
        in_flight: InFlightSteps,
    ) -> None:
        self._models = models
        self._allocator = allocator
        self._quotas = quotas
        self._prefixes = prefixes
        self._in_flight = in_flight
        self._blocked = BlockedRequests(allocator, quotas, in_flight)
        # Not wrapped in a method: policies call it for every model before every step.
        self.refused = self._blocked.is_blocked

    def admit(self, state: ModelState) -> Request | None:
        """Admits the first waiting request of a model, if there are pages and a slot for it.

        Returns:
          The request, which now has pages, a slot and the state `PREFILL`; None if there is no
          waiting request or no room.
        """
        request, spec = state.first, state.spec
        if request is None or not state.free_slots:
            return None
        if self.refused(state) or (request.last_step and not self._in_flight.is_settled(request)):
            return None
        num_blocks = _blocks_to_admit(spec, request)
        prefix = self._prefixes.find(state, request)
        replica = prefix.replica if prefix.blocks else self._choose_replica(state)
        headroom = spec.blocks_for(spec.limits.max_decode_tokens * state.running_on(replica))
        if not self._should_share(state, prefix, num_blocks + headroom):
            prefix = CachedPrefix(replica, [])
        new_blocks = num_blocks - len(prefix.blocks)
        if not self._secure_slabs(state, request, num_blocks, new_blocks + headroom, prefix):
            return None
        if spec.name in self._blocked.by_model:
            self._blocked.remove(spec.name)
        state.remove(request)
        if prefix.blocks:
            self._allocator.share(spec.name, prefix.blocks)
        request.blocks = [*prefix.blocks, *self._allocate(spec.name, new_blocks, replica)]
        request.slot = state.take_slot(replica)
        request.prefix_tokens = request.num_tokens
        request.findable_blocks = len(prefix.blocks)
        request.found_tokens = request.dispatched = len(prefix.blocks) * spec.tokens_per_page
        self._prefixes.record_lookup(state, request)
        state.start_prefill(request)
        return request

    def grow(
        self, state: ModelState, slots: np.ndarray, num_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Allocates the blocks that running sequences need for their next tokens.

        If pages are short, sequences get blocks for fewer tokens. If pages are short even for one
        token, requests are preempted.

        Args:
          state: the sequences' model.
          slots: int64 `[S]`, slots of sequences that may generate at least one more token.
          num_tokens: maximum number of tokens for each.

        Returns:
          Slots of the sequences that have their blocks; tokens of each; blocks that each needs.
        """
        table, tokens_per_block = state.table, state.spec.tokens_per_page
        while True:
            counts, blocks, short = plan_growth(table, slots, num_tokens, tokens_per_block)
            missing = (blocks - table.num_blocks[slots])[short]
            if self._allocate_growth(state, slots[short], missing):
                return slots, counts, blocks
            if num_tokens == 1:
                slots = self._grow_by_one_token(state, slots, short)
                counts, blocks, _ = plan_growth(table, slots, 1, tokens_per_block)
                return slots, counts, blocks
            num_tokens //= 2

    def release(self, request: Request) -> None:
        """Removes a request from its model's groups, and frees its pages and slot if it has any."""
        state = self._models[request.model]
        state.remove(request)
        if request.state in (RequestState.WAITING, RequestState.DEFERRED):
            self.forget(request)
            return
        self._prefixes.release(request)
        self._blocked.record_release(request.model)
        request.blocks = []
        state.free_slots.append(request.slot)
        request.slot = -1

    def forget(self, request: Request) -> None:
        """Removes a waiting request from the queue of blocked requests, if it is there."""
        self._blocked.forget(request)

    # Admission

    def _choose_replica(self, state: ModelState) -> int:
        """Chooses, of the replicas with free slots, the one with the most available blocks.

        Ties: the most free slots, then the lowest number.
        """
        if state.spec.replicas == 1:
            return 0
        name, available = state.spec.name, self._allocator.available_blocks
        slots = Counter([slot % state.spec.replicas for slot in state.free_slots])
        return max(slots, key=lambda replica: (available(name, replica), slots[replica], -replica))

    def _should_share(self, state: ModelState, prefix: CachedPrefix, num_blocks: int) -> bool:
        """Whether using a cached prefix takes no slabs that other requests may need.

        Args:
          state: the model.
          prefix: the cached prefix.
          num_blocks: all blocks that are needed, including those of the prefix.
        """
        if not prefix.blocks:
            return False
        name, replica = state.spec.name, prefix.replica
        slabs_to_lease = self._allocator.slabs_to_lease
        new_blocks = num_blocks - len(prefix.blocks)
        slabs = slabs_to_lease(name, new_blocks, prefix.blocks, replica)
        packed = slabs_to_lease(name, num_blocks, replica=replica)
        return slabs <= max(packed, self._spare_slabs(name))

    def _spare_slabs(self, name: str) -> int:
        """Number of slabs that a model may lease only to keep its cached blocks."""
        return 0 if self._blocked.by_model else self._quotas.spare_slabs(name)

    def _secure_slabs(
        self,
        state: ModelState,
        request: Request,
        request_blocks: int,
        new_blocks: int,
        prefix: CachedPrefix,
    ) -> bool:
        """Ensures that the slabs for a request may be leased, or blocks the request.

        Preempts other requests if the rules of this module permit it.

        Args:
          state: the request's model.
          request: its first waiting request.
          request_blocks: blocks that the request needs.
          new_blocks: blocks to allocate, including headroom for running sequences.
          prefix: the cached prefix that it uses.
        """
        name, quotas, blocked = state.spec.name, self._quotas, self._blocked
        slabs = self._allocator.slabs_to_lease(name, new_blocks, prefix.blocks, prefix.replica)
        if not slabs:
            return True
        leased = self._allocator.leased_slabs(name)
        total = leased + slabs
        quota = quotas.quotas[name]
        over_quota = self._allocator.slabs_for(name, request_blocks) > quota
        queue_class = 1 if over_quota or total <= quota else 2
        overdue = blocked.is_overdue(name)
        fits = slabs <= quotas.leasable(name)
        reason = self._reclaim_reason(name, leased, total, overdue)
        if reason != "floor" and (fits or reason):
            current_class = 0 if overdue and queue_class == 1 else queue_class
            if total > blocked.slab_limit(request, current_class):
                fits, reason = False, None
        if fits or (reason and self._preempt_for(name, slabs, None, reason)):
            return True
        quotas.record_refusal(name, slabs)
        blocked.add(
            request,
            slabs,
            queue_class=queue_class,
            over_quota=over_quota,
            no_victims=reason is not None,
        )
        return False

    def _reclaim_reason(
        self, name: str, leased: int, total: int, overdue: bool
    ) -> ReclaimReason | None:
        """Returns the rule that permits preemption to admit a request; None if there is none.

        Args:
          name: the request's model.
          leased: slabs that the model leases.
          total: slabs that it would lease with the request.
          overdue: whether the model has been blocked for `RECLAIM_STEPS` steps.
        """
        floor = self._quotas.floors[name]
        if total <= floor:
            return "floor"
        if not overdue or not self._quotas.reclaims:
            return None
        if total <= self._quotas.quotas[name]:
            return "quota"
        return "first request" if floor and not leased else None

    # Growth

    def _allocate_growth(self, state: ModelState, slots: np.ndarray, missing: np.ndarray) -> bool:
        """Allocates the missing blocks of all these sequences, or none.

        Returns:
          Whether the blocks were allocated.
        """
        if not slots.size:
            return True
        if state.spec.replicas > 1:
            return self._allocate_replica_growth(state, slots, missing)
        name, total = state.spec.name, int(missing.sum())
        slabs = self._allocator.slabs_to_lease(name, total)
        if slabs and slabs > self._quotas.leasable(name):
            return False
        append_blocks(state.table, slots, missing, self._allocate(name, total, 0))
        return True

    def _allocate_replica_growth(
        self, state: ModelState, slots: np.ndarray, missing: np.ndarray
    ) -> bool:
        """`_allocate_growth` for several replicas: a leased slab has blocks for each of them."""
        name, allocator, replicas = state.spec.name, self._allocator, slots % state.spec.replicas
        totals = {
            int(index): int(missing[replicas == index].sum()) for index in np.unique(replicas)
        }
        slabs = max(
            allocator.slabs_to_lease(name, total, replica=index) for index, total in totals.items()
        )
        if slabs and slabs > self._quotas.leasable(name):
            return False
        for index, total in totals.items():
            rows = replicas == index
            blocks = self._allocate(name, total, index)
            append_blocks(state.table, slots[rows], missing[rows], blocks)
        return True

    def _grow_by_one_token(
        self, state: ModelState, slots: np.ndarray, short: np.ndarray
    ) -> np.ndarray:
        """Allocates blocks for one token each, oldest request first; preempts where needed.

        Args:
          state: the sequences' model.
          slots: slots of the sequences.
          short: indices of the slots that need a block.

        Returns:
          Slots of the sequences that can generate a token.
        """
        name, table, replicas = state.spec.name, state.table, state.spec.replicas
        allocator = self._allocator
        queue = sorted(table.requests[slots[short]], key=lambda request: request.order)
        while queue:
            new_blocks = self._quotas.leasable(name) * allocator.blocks_per_slab(name)
            room = [
                new_blocks + allocator.available_blocks(name, replica)
                for replica in range(replicas)
            ]
            growing: list[int] = []
            unserved: list[Request] = []
            for request in queue:
                replica = request.slot % replicas
                if room[replica]:
                    room[replica] -= 1
                    growing.append(request.slot)
                else:
                    unserved.append(request)
            ones = np.ones(len(growing), np.int64)
            self._allocate_growth(state, np.array(growing, np.int64), ones)
            queue = unserved
            # If no request may be preempted for the oldest, none may be for the younger ones.
            if not queue or not self._preempt_for(name, 1, queue[0], "growth"):
                break
            queue = [request for request in queue if request.state is RequestState.RUNNING]
        unserved_slots = {request.slot for request in queue}
        kept = [
            slot
            for slot in slots.tolist()
            if slot not in unserved_slots and table.requests[slot] is not None
        ]
        return np.array(kept, np.int64)

    # Preemption

    def _preempt_for(
        self, name: str, slabs: int, requester: Request | None, reason: ReclaimReason
    ) -> bool:
        """Preempts requests so that a model can lease slabs, or its requester can get a block.

        Returns:
          Whether the rules permit it. If False, no request was preempted.
        """
        holders = {other: state.holders() for other, state in self._models.items()}
        victims = plan_preemption(self._allocator, self._quotas, holders, name, slabs, requester)
        if victims is None:
            return False
        before = {victim.model: self._allocator.leased_slabs(victim.model) for victim in victims}
        for victim in victims:
            state = self._models[victim.model]
            self.release(victim)
            victim.preemptions += 1
            state.preemptions += 1
            state.requeue(victim)
        for donor, leased in before.items():
            if donor != name:
                freed = leased - self._allocator.leased_slabs(donor)
                requests = sum(victim.model == donor for victim in victims)
                self._quotas.record_reclaim(donor, name, freed, requests, reason)
        return True

    def _allocate(self, name: str, num_blocks: int, replica: int) -> list[int]:
        self._prefixes.evict_to_fit(name, num_blocks, self._spare_slabs(name), replica)
        blocks = self._allocator.allocate(name, num_blocks, replica)
        if blocks is None:  # the quotas were checked and never permit more than is free
            raise AssertionError(f"the quotas permit {num_blocks} blocks of {name} that do not fit")
        self._quotas.record_lease(name)
        return blocks

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if the allocator and the blocks of the requests do not agree."""
        for name, state in self._models.items():
            references = Counter(block for holder in state.holders() for block in holder.blocks)
            assert all(
                self._allocator.references(block) == count for block, count in references.items()
            )
            blocks_per_replica = -(-len(references) // state.spec.replicas)
            assert blocks_per_replica * state.spec.num_layers == self._allocator.used_pages(name)
            for request in state.holders():
                replica = request.slot % state.spec.replicas
                assert all(self._allocator.replica_of(block) == replica for block in request.blocks)
            self._blocked.check_invariants(state)


def _blocks_to_admit(spec: ModelSpec, request: Request) -> int:
    """Blocks for all tokens of a waiting request and its first decode burst."""
    left = request.max_new_tokens - len(request.output) - 1
    return spec.blocks_for(request.num_tokens + min(left, spec.limits.max_decode_tokens))
