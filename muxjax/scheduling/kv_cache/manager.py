"""Who holds pages and slots: admission, growth, preemption, release.

A request is admitted when there are pages for its whole prefix and a first decode burst, and for a
burst of those of its model that run already, who would else soon preempt it. Running sequences grow
by blocks; where pages are short, `preemption.py` says who must give.

Requests that were refused pages stand in one line over all models: last those that have to borrow
because others of their model fill its quota; first those of the rest whose model has been refused
for `RECLAIM_STEPS` steps; each part in the order of arrival. While a request stands in it, nobody
behind it may keep taking what comes free: admitting one must leave its model within its quota, or
within its floor if the one before it needs more than the quota of its own model. Running requests
end, so that the first in line gets its turn. Who is not asked for any more, since the policy turned
to others, stands in nobody's way.

What was borrowed comes back in three ways:
- to a model that stays within its floor at once, by preemption;
- to a model that stays within its quota after `RECLAIM_STEPS` steps, from models over theirs;
- to a model that holds nothing, and whose floor and quota are too small for its first request,
  after as many steps, from models over their floors. So each model with a floor runs one request
  at least.

The oldest request of the unit keeps its pages even so; see `preemption.py`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.preemption import plan_preemption
from muxjax.scheduling.kv_cache.prefix_cache import Found, PrefixCache
from muxjax.scheduling.kv_cache.quota_records import ReclaimReason
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request, RequestState
from muxjax.scheduling.slot_table import SlotTable
from muxjax.scheduling.specs import ModelSpec

RECLAIM_STEPS = 12
"""Steps that borrowers are given to end by themselves before they are preempted for a quota. Few
enough that a model has its pages within 20 steps, turns of other models included."""
_CLAIM_AGAIN = 4
"""Steps before a claim that found nobody to preempt is worked out again, if nothing was freed."""


@dataclass(slots=True)
class _Refusal:
    """The first waiting request of a model, which was refused pages.

    Attributes:
      request: the request.
      since: steps made when its model was first refused, and not for having filled its quota.
      asked: steps made when the policy last asked for it.
      again: steps made when it is worked out again whether it can be admitted.
      changes: what `KVCacheManager._changes` gave when that was worked out last.
      slabs: how many were needed.
      place: 2 if it had to borrow because others of its model filled the quota then, else 1.
      over_quota: whether it needs more than its model's quota by itself.
    """

    request: Request
    since: int
    asked: int
    again: float
    changes: int
    slabs: int
    place: int
    over_quota: bool


class KVCacheManager:
    """Gives pages and slots to requests and takes them back, within quotas.

    Args:
      models: state of each model; requests move between its groups here.
      allocator: the pool.
      quotas: floors and quotas.
      prefixes: what of a prefix is in the pool already.
      flights: steps made and not applied; how many have been made in all.
    """

    def __init__(
        self,
        models: Mapping[str, ModelState],
        allocator: SlabAllocator,
        quotas: KVQuotas,
        prefixes: PrefixCache,
        flights: InFlightSteps,
    ) -> None:
        self._models = models
        self._allocator = allocator
        self._quotas = quotas
        self._prefixes = prefixes
        self._flights = flights
        self._refused: dict[str, _Refusal] = {}
        self._released: dict[str, int] = defaultdict(int)
        self._line_changes = 0

    def admit(self, state: ModelState) -> Request | None:
        """Moves the first waiting request to those being prefilled, if there is room for it."""
        request, spec = state.first, state.spec
        if request is None or not state.free_slots:
            return None
        if self.refused(state) or (request.last_step and not self._flights.is_settled(request)):
            return None
        blocks = _blocks_to_admit(spec, request)
        found = self._prefixes.find(state, request)
        copy = found.copy if found.blocks else self._emptiest_copy(state)
        headroom = spec.blocks_for(spec.limits.max_decode_tokens * state.running_on(copy))
        if not self._worth_taking(state, found, blocks + headroom):
            found = Found(copy, [])
        new = blocks - len(found.blocks)
        if not self._may_admit(state, request, blocks, new + headroom, found):
            return None
        if spec.name in self._refused:
            self._forget(spec.name)
        state.remove(request)
        if found.blocks:
            self._allocator.share(spec.name, found.blocks)
        request.blocks = [*found.blocks, *self._allocate(spec.name, new, copy)]
        request.slot = state.take_slot(copy)
        request.prefix_tokens = request.num_tokens
        request.findable_blocks = len(found.blocks)
        request.found_tokens = request.dispatched = len(found.blocks) * spec.tokens_per_page
        self._prefixes.note_admitted(state, request)
        state.start_prefill(request)
        return request

    def refused(self, state: ModelState) -> bool:
        """Whether a model's first waiting request was refused pages and nothing has changed since.

        It counts as asked for once more. Where pages are short this is asked of each model before
        each step, so that it must be quick.
        """
        name = state.spec.name
        refusal = self._refused.get(name)
        if refusal is None:
            return False
        refusal.asked = made = self._flights.started
        if refusal.request is not state.first or made >= refusal.again:
            return False
        if refusal.changes != self._released[name] + self._line_changes + self._quotas.changes:
            return False
        return refusal.slabs > self._quotas.leasable(name)

    def grow(
        self, state: ModelState, slots: np.ndarray, num_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives running sequences the blocks for their next tokens.

        If pages are short, for fewer tokens; if they are short for one token, others are preempted.

        Args:
          state: their model.
          slots: int64 `[S]`, slots of sequences that have tokens left to make.
          num_tokens: how many are wanted for each.

        Returns:
          Slots of the sequences that have their blocks; tokens for each; blocks that each needs.
        """
        table, per_block = state.table, state.spec.tokens_per_page
        while True:
            counts, blocks, short = _growth(table, slots, num_tokens, per_block)
            if self._give(state, slots[short], (blocks - table.num_blocks[slots])[short]):
                return slots, counts, blocks
            if num_tokens == 1:
                slots = self._grow_each(state, slots, short)
                counts, blocks, _ = _growth(table, slots, 1, per_block)
                return slots, counts, blocks
            num_tokens //= 2

    def release(self, request: Request) -> None:
        """Takes a request out of its model's groups, with its pages and slot if it has any."""
        state = self._models[request.model]
        state.remove(request)
        if request.state in (RequestState.WAITING, RequestState.DEFERRED):
            self.forget(request)
            return
        self._prefixes.release(request)
        self._released[request.model] += 1
        request.blocks = []
        state.free_slots.append(request.slot)
        request.slot = -1

    def forget(self, request: Request) -> None:
        """Drops the record that the request was refused pages, if there is one."""
        refusal = self._refused.get(request.model)
        if refusal is not None and refusal.request is request:
            self._forget(request.model)

    # Admission

    def _changes(self, model: str) -> int:
        """A count that goes up when a refused request might be admitted with no more pages free."""
        return self._released[model] + self._line_changes + self._quotas.changes

    def _forget(self, model: str) -> None:
        del self._refused[model]
        self._line_changes += 1

    def _ripe(self, refusal: _Refusal) -> bool:
        return refusal.place == 1 and self._flights.started - refusal.since >= RECLAIM_STEPS

    def _emptiest_copy(self, state: ModelState) -> int:
        """The copy with a free slot that has most blocks to give, or else most free slots."""
        if state.spec.replicas == 1:
            return 0
        name, available = state.spec.name, self._allocator.available_blocks
        slots = Counter([slot % state.spec.replicas for slot in state.free_slots])
        return max(slots, key=lambda copy: (available(name, copy), slots[copy], -copy))

    def _worth_taking(self, state: ModelState, found: Found, blocks: int) -> bool:
        """Whether what is there of a prefix can be had without slabs that others may want.

        Args:
          state: the model.
          found: what is there.
          blocks: all that is needed, with what is found.
        """
        if not found.blocks:
            return False
        name, to_lease, copy = state.spec.name, self._allocator.slabs_to_lease, found.copy
        slabs = to_lease(name, blocks - len(found.blocks), found.blocks, copy)
        return slabs <= max(to_lease(name, blocks, copy=copy), self._spare(name))

    def _spare(self, name: str) -> int:
        """Slabs that a model may lease beyond what it must, so as to keep what is cached."""
        return 0 if self._refused else self._quotas.spare(name)

    def _may_admit(
        self, state: ModelState, request: Request, alone: int, blocks: int, found: Found
    ) -> bool:
        """Whether there is room for a request, or is made.

        Args:
          state: its model.
          request: the first that waits.
          alone: blocks that it takes itself.
          blocks: blocks to be had besides those found, with those for others that run.
          found: what is there of its prefix.
        """
        name = state.spec.name
        quotas = self._quotas
        slabs = self._allocator.slabs_to_lease(name, blocks, found.blocks, found.copy)
        if not slabs:
            return True
        leased = self._allocator.leased_slabs(name)
        total = leased + slabs
        refusal = self._refused.get(name)
        ripe = refusal is not None and self._ripe(refusal)
        quota = quotas.quotas[name]
        over_quota = self._allocator.slabs_for(name, alone) > quota
        place = 1 if over_quota or total <= quota else 2
        fits = slabs <= quotas.leasable(name)
        reason = self._claim(name, leased, total, ripe)
        if reason != "floor" and (fits or reason):
            place_now = 0 if ripe and place == 1 else place
            first = total <= self._limit_in_line(request, place_now)
            reason = reason if first else None
            fits = fits and first
        if fits or (reason and self._preempt_for(name, slabs, None, reason)):
            return True
        quotas.note_refused(name, slabs)
        made, changes = self._flights.started, self._changes(name)
        since = made if refusal is None or refusal.place == 2 else refusal.since
        again = made + _CLAIM_AGAIN if reason else math.inf
        if place == 1 and not ripe:
            again = min(again, since + RECLAIM_STEPS)
        self._refused[name] = _Refusal(
            request, since, made, again, changes, slabs, place, over_quota
        )
        return False

    def _claim(self, name: str, leased: int, total: int, ripe: bool) -> ReclaimReason | None:
        """On what grounds a request may have others preempted so as to be admitted."""
        floor = self._quotas.floors[name]
        if total <= floor:
            return "floor"
        if not ripe or not self._quotas.reclaims:
            return None
        if total <= self._quotas.quotas[name]:
            return "quota"
        return "first request" if floor and not leased else None

    def _limit_in_line(self, request: Request, place: int) -> int:
        """Most slabs that the request's model may come to by admitting it.

        Args:
          request: the first waiting one of its model.
          place: the part of the line that it stands in: 0, 1 or 2.
        """
        allocator, model = self._allocator, request.model
        limit = allocator.num_slabs
        if not self._refused or allocator.free_slabs == limit:
            return limit
        quota = self._quotas.quotas[model]
        patience = max(RECLAIM_STEPS, 2 * len(self._models))
        for name, refusal in self._refused.items():
            if name == model or self._flights.started - refusal.asked > patience:
                continue
            other = 0 if self._ripe(refusal) else refusal.place
            if (other, refusal.request.order) > (place, request.order):
                continue
            if refusal.over_quota:
                return self._quotas.floors[model]
            limit = quota
        return limit

    # Growth

    def _give(self, state: ModelState, slots: np.ndarray, missing: np.ndarray) -> bool:
        """Gives sequences the blocks that they lack, or none of them any."""
        if not slots.size:
            return True
        replicas = state.spec.replicas
        if replicas > 1:
            return self._give_copies(state, slots, missing)
        name, total = state.spec.name, int(missing.sum())
        slabs = self._allocator.slabs_to_lease(name, total)
        if slabs and slabs > self._quotas.leasable(name):
            return False
        _hand_out(state.table, slots, missing, self._allocate(name, total, 0))
        return True

    def _give_copies(self, state: ModelState, slots: np.ndarray, missing: np.ndarray) -> bool:
        """`_give` where each copy needs blocks of its own; a slab has some for every copy."""
        name, allocator, which = state.spec.name, self._allocator, slots % state.spec.replicas
        totals = {int(copy): int(missing[which == copy].sum()) for copy in np.unique(which)}
        slabs = max(allocator.slabs_to_lease(name, n, copy=copy) for copy, n in totals.items())
        if slabs and slabs > self._quotas.leasable(name):
            return False
        for copy, total in totals.items():
            own = which == copy
            _hand_out(state.table, slots[own], missing[own], self._allocate(name, total, copy))
        return True

    def _grow_each(self, state: ModelState, slots: np.ndarray, short: np.ndarray) -> np.ndarray:
        """Gives sequences the block for one token more, oldest first, preempting where it must.

        Returns:
          The slots of those that can make a token.
        """
        name, table, replicas = state.spec.name, state.table, state.spec.replicas
        allocator = self._allocator
        queue = sorted(table.requests[slots[short]], key=lambda request: request.order)
        while queue:
            new = self._quotas.leasable(name) * allocator.blocks_per_slab(name)
            room = [new + allocator.available_blocks(name, copy) for copy in range(replicas)]
            lucky: list[int] = []
            rest: list[Request] = []
            for request in queue:
                copy = request.slot % replicas
                if room[copy]:
                    room[copy] -= 1
                    lucky.append(request.slot)
                else:
                    rest.append(request)
            self._give(state, np.array(lucky, np.int64), np.ones(len(lucky), np.int64))
            queue = rest
            # What an older one may not take, a younger one of the same model may not either.
            if not queue or not self._preempt_for(name, 1, queue[0], "growth"):
                break
            queue = [request for request in queue if request.state is RequestState.RUNNING]
        without = {request.slot for request in queue}
        kept = [
            slot
            for slot in slots.tolist()
            if slot not in without and table.requests[slot] is not None
        ]
        return np.array(kept, np.int64)

    # Preemption

    def _preempt_for(
        self, name: str, slabs: int, requester: Request | None, reason: ReclaimReason
    ) -> bool:
        """Preempts others so that a model can lease slabs, or its requester get a block."""
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
        for giver, leased in before.items():
            if giver != name:
                freed = leased - self._allocator.leased_slabs(giver)
                requests = sum(victim.model == giver for victim in victims)
                self._quotas.note_reclaimed(giver, name, freed, requests, reason)
        return True

    def _allocate(self, name: str, num_blocks: int, copy: int) -> list[int]:
        self._prefixes.make_room(name, num_blocks, self._spare(name), copy)
        blocks = self._allocator.allocate(name, num_blocks, copy)
        if blocks is None:  # the quotas, which were asked, never promise more than is free
            raise AssertionError(f"{name} was promised {num_blocks} blocks that are not there")
        self._quotas.note_leased(name)
        return blocks

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if blocks and what the requests hold do not agree."""
        for name, state in self._models.items():
            blocks = [block for request in state.holders() for block in request.blocks]
            held = Counter(blocks)
            assert all(self._allocator.references(block) == held[block] for block in held)
            each = -(-len(held) // state.spec.replicas)
            assert each * state.spec.num_layers == self._allocator.used_pages(name)
            for request in state.holders():
                copy = request.slot % state.spec.replicas
                assert all(self._allocator.copy_of(block) == copy for block in request.blocks)
        for name, refusal in self._refused.items():
            assert self._models[name].waiting.get(refusal.request.id) is refusal.request


def _growth(
    table: SlotTable, slots: np.ndarray, num_tokens: int, per_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that each sequence makes, blocks that it then needs, and which have too few.

    The last token of a sequence is not in the pool yet: it is written first.
    """
    made = table.expected[slots]
    counts = np.minimum(table.limit[slots] - made, num_tokens)
    blocks = (table.prompt[slots] + made + counts + (per_block - 2)) // per_block
    return counts, blocks, (blocks > table.num_blocks[slots]).nonzero()[0]


def _hand_out(table: SlotTable, slots: np.ndarray, missing: np.ndarray, blocks: list[int]) -> None:
    """Adds blocks to the sequences that lack them, as many as each lacks."""
    if len(blocks) == slots.size:  # one each, as nearly always
        for own, block in zip(table.blocks[slots].tolist(), blocks, strict=True):
            own.append(block)
    else:
        new = iter(blocks)
        for own, count in zip(table.blocks[slots].tolist(), missing.tolist(), strict=True):
            own.extend(islice(new, count))
    table.num_blocks[slots] += missing


def _blocks_to_admit(spec: ModelSpec, request: Request) -> int:
    """Blocks for all tokens that a waiting request has, and for its first decode burst."""
    left = request.max_new_tokens - len(request.output) - 1
    return spec.blocks_for(request.num_tokens + min(left, spec.limits.max_decode_tokens))
