"""Which requests lose their pages when the pool is short (design, section 5).

Borrowed pages go first (models over their quota, most over first), then those of the model most
over its floor; within a model the youngest request goes first. Who may claim what:

- A model that stays within its floor may take from any model over its floor.
- A model that stays within its quota may take from models over their quota, for a running sequence
  at once and for a request that is to be admitted when it has waited long (`residency.py`).
- A model that holds nothing, and whose quota cannot hold its first request, may take for that from
  models over their floor, when it has waited as long.
- Any other running sequence may take from younger requests only: of its own model, of models over
  their quota, and, if it is the oldest request that holds pages in the unit, of models over their
  floor.

The only request of a model counts as within its quota: it is taken for a floor or for the oldest
request only, and last. Each model thus goes on with one request, whatever its quota.

Why every request that was admitted ends: the oldest one of the unit that holds pages (the anchor)
is not preempted while anyone else can be, and may itself take all that others hold beyond their
floors. `quotas.compute_floors` leaves it room for its full length beside those floors: once the
younger requests of its own model are gone, its slabs hold nothing but its blocks. It therefore runs
to its end, and then the next one is the oldest. Where a model has copies, a block of another copy
is of no use to it, but a slab that comes free is, and those go with the requests of all copies.
Only a model under its floor may preempt it, as a last resort, when its blocks lie strewn over more
slabs than they need, and not before its prefill has brought it a token.

Slabs come free only when nothing in them is in use, so a victim is taken only if a slab comes free
by it, and a block that others refer to as well only when they are all gone; plans are worked out on
counters first and nobody is preempted in vain. What is cached counts as free here (`allocator.py`):
it goes before any request does.
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
    """Chooses whom to preempt so that a model can lease slabs.

    Args:
      allocator: the pool.
      quotas: floors and quotas.
      holders: requests that hold pages, by model, oldest first.
      model: who needs slabs.
      slabs: how many must become leasable.
      requester: the running sequence that grows by one block; None for a request that is to be
        admitted. Whether that may have others preempted yet is for the caller to know.

    Returns:
      The victims, or None if the rules above do not yield enough. Preempting a request of the
      requester's own model may free a block in a slab the model keeps: then no slab is needed.
    """
    plan = _Plan(allocator, quotas, holders, model, slabs, requester)
    return plan.victims if plan.make() else None


class _Plan:
    """Counters of what would be if the victims so far were gone."""

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
        self._left = {name: list(requests) for name, requests in holders.items()}
        self._leased = {name: allocator.leased_slabs(name) for name in holders}
        self._free = allocator.free_slabs
        self._gone: Counter[int] = Counter()  # blocks of a slab that nobody refers to any more
        self._dropped: Counter[int] = Counter()  # references to a block
        oldest = [requests[0] for requests in self._left.values() if requests]
        self._anchor = min(oldest, key=lambda request: request.order, default=None)
        self._first_request = (
            requester is None and not self._leased[model] and slabs > quotas.quotas[model]
        )
        self.victims: list[Request] = []

    def make(self) -> bool:
        if self._make(spare_anchor=True):
            return True
        # The anchor's blocks may be strewn over so many slabs that floors cannot be met beside it.
        # Once it has got a token for its prefill it may go, to come back packed.
        anchor = self._anchor
        last_resort = anchor is not None and anchor.state is RequestState.RUNNING
        return last_resort and self._within(self._quotas.floors) and self._make(spare_anchor=False)

    def _make(self, *, spare_anchor: bool) -> bool:
        while not self._enough():
            if not any(self._take(name, spare_anchor) for name in self._givers()):
                return False
        return True

    def _enough(self) -> bool:
        """Whether the model could lease what it needs now; see `KVQuotas.leasable`."""
        quotas, model = self._quotas, self._model
        within_quota = quotas.quotas[model] - self._leased[model]
        unfilled = sum(
            max(0, floor - self._leased[name])
            for name, floor in quotas.floors.items()
            if name != model
        )
        leasable = min(self._free, max(within_quota, self._free - unfilled, 0))
        return leasable >= self._slabs

    def _givers(self) -> list[str]:
        """Models that may lose a request, in the order in which they do."""
        floors, quotas = self._quotas.floors, self._quotas.quotas

        def rank(name: str) -> tuple[bool, int, int]:
            leased = self._leased[name]
            return (
                len(self._left[name]) == 1,
                -max(0, leased - quotas[name]),
                floors[name] - leased,
            )

        return sorted((name for name in self._left if self._may_claim(name)), key=rank)

    def _may_claim(self, name: str) -> bool:
        """Whether the requester's model may take anything of this model at all."""
        floors, quotas, model = self._quotas.floors, self._quotas.quotas, self._model
        if name == model:
            return self._requester is not None
        over_floor = self._leased[name] > floors[name]
        anchor = self._requester is not None and self._requester is self._anchor
        if self._within(floors) or anchor:
            return over_floor
        if len(self._left[name]) == 1:
            return False
        return over_floor if self._first_request else self._leased[name] > quotas[name]

    def _within(self, limits: Mapping[str, int]) -> bool:
        return self._leased[self._model] + self._slabs <= limits[self._model]

    def _any_age(self, name: str) -> bool:
        """Whether requests older than the requester may be taken from this model."""
        if name == self._model:
            return False
        if self._within(self._quotas.floors):
            return True
        return self._within(self._quotas.quotas) and self._leased[name] > self._quotas.quotas[name]

    def _take(self, name: str, spare_anchor: bool) -> bool:
        """Adds a model's youngest requests until something comes free; False if nothing does."""
        any_age = self._any_age(name)
        requester = self._requester
        gone, dropped = self._gone.copy(), self._dropped.copy()
        taken: list[Request] = []
        released: set[int] = set()
        for request in reversed(self._left[name]):
            if request is requester or (spare_anchor and request is self._anchor):
                continue
            if not any_age and requester is not None and request.order < requester.order:
                break
            taken.append(request)
            slabs: set[int] = set()
            for block in request.blocks:
                dropped[block] += 1
                if dropped[block] < self._allocator.references(block):
                    continue
                slab = self._allocator.slab_of(block)
                slabs.add(slab)
                gone[slab] += 1
                if gone[slab] == self._allocator.used_blocks_in(slab):
                    released.add(slab)
            if name == self._model and not slabs <= released and self._same_copy(request):
                # A block of a slab that the model keeps: the requester can have it at once.
                self._slabs = 0
                taken = [other for other in taken if self._same_copy(other)]
                self._commit(name, taken, released, gone, dropped)
                return True
            if released:
                self._commit(name, taken, released, gone, dropped)
                return True
        return False

    def _same_copy(self, request: Request) -> bool:
        """Whether blocks of a request of the requester's model are of use to the requester."""
        copy_of, requester = self._allocator.copy_of, self._requester
        return requester is not None and copy_of(request.blocks[0]) == copy_of(requester.blocks[0])

    def _commit(
        self,
        name: str,
        taken: list[Request],
        released: set[int],
        gone: Counter[int],
        dropped: Counter[int],
    ) -> None:
        if self._slabs:
            # Those who hold nothing of the slabs that come free may stay.
            kept = [r for r in taken if not self._holds_any(r, released)]
            for request in kept:
                for block in request.blocks:
                    if dropped[block] == self._allocator.references(block):
                        gone[self._allocator.slab_of(block)] -= 1
                    dropped[block] -= 1
            taken = [request for request in taken if request not in kept]
        for request in taken:
            self._left[name].remove(request)
        self.victims += taken
        self._gone, self._dropped = gone, dropped
        self._leased[name] -= len(released)
        self._free += len(released)

    def _holds_any(self, request: Request, slabs: set[int]) -> bool:
        return any(self._allocator.slab_of(block) in slabs for block in request.blocks)
