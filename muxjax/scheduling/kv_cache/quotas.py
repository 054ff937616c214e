"""How many slabs of the pool each model may hold (MuxServe, section 3.3, with floors added).

Each model has a floor, which is guaranteed, and a quota of at least its floor. All quotas together
are the whole pool. Both are counted in slabs, the unit that is leased.

- Up to its quota a model may lease whatever is physically free.
- Above it, it borrows: only what is free beyond the floors that other models have not filled.
- What it borrows it gives back when others need it, soon or at once (`residency.py` says when, and
  `preemption.py` from whom).
- Every `QUOTA_PERIOD` seconds quota moves from models that used less than `WELL_USED` of theirs to
  models that were refused pages at theirs; where all are short, it moves back towards the initial
  quotas, which are in proportion to the expected need.

Fairness is even use in proportion to need (the paper's `R`): the normalised use of a model is its
part of the leased pages over its part of the expected need, 1 if it has exactly that, and quota
moves towards equal ones wherever all could use more.

Floors leave room for a request of full length of any one model: `need(m) + floors of the others <=
pool`. So a request that is alone with models within their floors can always run to its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quota_records import MoveReason, QuotaMove, Reclaim, ReclaimReason
from muxjax.scheduling.specs import ModelSpec

QUOTA_PERIOD = 3.0
"""Seconds between moves of quota."""
WELL_USED = 0.9
"""A model that used less than this part of its quota can give some away (MuxServe's threshold)."""
DEFAULT_FLOORS = 0.25
"""The part of the pool that is guaranteed to models whose floors are not given, all together."""
RECORDS_KEPT = 32


class KVQuotas:
    """Floors and quotas of a unit's models.

    Attributes:
      reclaims: whether what is borrowed beyond a quota is taken back by preemption.
      floors, quotas: slabs of each model.
      initial: the quotas at the start, in proportion to the expected need.
      changes: how often quotas may have changed.
      moves, reclaimed: the last transfers of quota, and of pages by preemption.
      given_back, taken_back: pages that each model lost and got by preemption, in all.

    Args:
      specs: the models.
      allocator: the pool; its leases are what quotas are compared with.
      needs: expected need of pages of each model, in any one unit: what initial quotas follow.

    Raises:
      PoolTooSmall: a request of full length of some model could never run.
    """

    reclaims = True

    def __init__(
        self, specs: Iterable[ModelSpec], allocator: SlabAllocator, needs: Mapping[str, float]
    ) -> None:
        self._allocator = allocator
        self.changes = 0
        self.moves: deque[QuotaMove] = deque(maxlen=RECORDS_KEPT)
        self.reclaimed: deque[Reclaim] = deque(maxlen=RECORDS_KEPT)
        self.given_back: dict[str, int] = {}
        self.taken_back: dict[str, int] = {}
        self._now = 0.0
        self._short: set[str] = set()
        self._next_move: float | None = None
        self.divide(specs, needs)

    def divide(self, specs: Iterable[ModelSpec], needs: Mapping[str, float]) -> None:
        """Divides the pool anew, among these models.

        Who holds more than its new quota has borrowed the rest.

        Raises:
          PoolTooSmall: a request of full length of some model could never run; nothing is changed.
        """
        specs = list(specs)
        floors, quotas = self._parts(specs, needs)
        self.floors, self.initial, self.quotas = floors, dict(quotas), quotas
        names = [spec.name for spec in specs]
        total = sum(max(0.0, needs[name]) for name in names)
        self._need_shares = {
            name: max(0.0, needs[name]) / total if total else 1.0 / len(names) for name in names
        }
        self._peaks = {name: self._allocator.leased_slabs(name) for name in names}
        for name in names:
            self.given_back.setdefault(name, 0)
            self.taken_back.setdefault(name, 0)
        self._short.intersection_update(names)
        self._unfilled = 0
        self._unfilled_at = -1  # as of which `SlabAllocator.lease_changes`
        self.changes += 1

    def _parts(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Floors and quotas."""
        floors = compute_floors(specs, self._allocator)
        weights = [max(0.0, needs[spec.name]) for spec in specs]
        shares = apportion(self._allocator.num_slabs, weights, list(floors.values()))
        return floors, dict(zip(floors, shares, strict=True))

    # What a model may lease

    def leasable(self, model: str) -> int:
        """Slabs that the model may lease now."""
        allocator = self._allocator
        free = allocator.free_slabs
        if not free:
            return 0
        leased = allocator.leased_slabs(model)
        within_quota = self.quotas[model] - leased
        if within_quota >= free:
            return free
        return max(within_quota, free - self._unfilled_floors(model, leased), 0)

    def over_quota(self, model: str) -> int:
        """Slabs that the model leases beyond its quota, negative below it."""
        return self._allocator.leased_slabs(model) - self.quotas[model]

    def over_floor(self, model: str) -> int:
        """Slabs that the model leases beyond its floor, negative below it."""
        return self._allocator.leased_slabs(model) - self.floors[model]

    def spare(self, model: str) -> int:
        """Slabs that the model may lease in nobody's way: within its quota, and beyond what others
        are guaranteed and do not hold.
        """
        leased = self._allocator.leased_slabs(model)
        free = self._allocator.free_slabs - self._unfilled_floors(model, leased)
        return max(0, min(self.quotas[model] - leased, free))

    def note_leased(self, model: str) -> None:
        """To be called after each allocation, so that short peaks count as use."""
        leased = self._allocator.leased_slabs(model)
        if leased > self._peaks[model]:
            self._peaks[model] = leased

    def note_refused(self, model: str, slabs: int) -> None:
        """Records that the model asked for slabs and did not get them."""
        if self._allocator.leased_slabs(model) + slabs > self.quotas[model]:
            self._short.add(model)

    def note_reclaimed(
        self, giver: str, taker: str, slabs: int, requests: int, reason: ReclaimReason
    ) -> None:
        """Records that requests were preempted so that another model gets their slabs."""
        pages = slabs * self._allocator.slab_pages
        self.given_back[giver] += pages
        self.taken_back[taker] += pages
        self.reclaimed.append(Reclaim(self._now, giver, taker, pages, requests, reason))

    # How it is used

    def peak_use(self, model: str) -> float:
        """The part of its quota that the model leased at most since the last moves."""
        peak = self._peaks[model]
        return peak / self.quotas[model] if self.quotas[model] else float(peak > 0)

    def normalised_use(self, model: str) -> float:
        """The model's part of what is leased over its part of the expected need.

        1 if each holds what its need is worth; infinite for pages of a model without need.
        """
        leased = self._allocator.leased_slabs(model)
        if not leased:
            return 0.0
        in_use = self._allocator.num_slabs - self._allocator.free_slabs
        need = self._need_shares[model]
        return leased / in_use / need if need else math.inf

    # Moving quota

    def due(self, now: float) -> bool:
        """Whether it is time to `move` quota. To be asked before each step."""
        self._now = now
        if self._next_move is None:
            self._next_move = now + QUOTA_PERIOD
        return now >= self._next_move

    def move(self, now: float, queued: Iterable[str]) -> None:
        """Moves quota from models that do not use theirs to models that are short.

        Args:
          now: seconds.
          queued: models with waiting requests; others need no more, even if they were short.
        """
        self._next_move = now + QUOTA_PERIOD
        self.changes += 1
        takers = [model for model in queued if model in self._short]
        if takers:
            self._move_to(takers, now)
        self._short.clear()
        for model in self._peaks:
            self._peaks[model] = self._allocator.leased_slabs(model)

    def _move_to(self, takers: Sequence[str], now: float) -> None:
        spare: dict[str, int] = {}
        reason: MoveReason = "unused"
        for model, quota in self.quotas.items():
            peak = self._peaks[model]
            if model not in takers and peak < WELL_USED * quota:
                unused = quota - max(self.floors[model], math.ceil(peak / WELL_USED))
                spare[model] = -(-unused // 2)
        if not any(amount > 0 for amount in spare.values()):
            # All are well used: those above their expected need give to those below it.
            reason = "expected need"
            takers = [model for model in takers if self.quotas[model] < self.initial[model]]
            for model, quota in self.quotas.items():
                above = quota - max(self.floors[model], self.initial[model])
                spare[model] = -(-above // 2) if above > 0 else 0
        if not takers:
            return
        below = {
            model: self.initial[model] - self.quotas[model] for model in takers
        }  # the most deprived takes first
        takers = sorted(takers, key=lambda model: -below[model])
        use = {model: self.peak_use(model) for model in self.quotas}
        for giver, amount in spare.items():
            shares = apportion(max(0, amount), [1.0] * len(takers), [0] * len(takers))
            for taker, slabs in zip(takers, shares, strict=True):
                if slabs:
                    self.quotas[giver] -= slabs
                    self.quotas[taker] += slabs
                    pages = slabs * self._allocator.slab_pages
                    self.moves.append(
                        QuotaMove(now, giver, taker, pages, reason, use[giver], use[taker])
                    )

    def _unfilled_floors(self, model: str, own: int) -> int:
        """Slabs that other models are guaranteed and do not hold, where this one leases `own`."""
        changes = self._allocator.lease_changes
        if self._unfilled_at != changes:
            self._unfilled_at = changes
            leased = self._allocator.leased_slabs
            missing = [floor - leased(other) for other, floor in self.floors.items()]
            self._unfilled = sum([slabs for slabs in missing if slabs > 0])
        floor = self.floors[model]
        return self._unfilled - (floor - own if floor > own else 0)

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if quotas and floors do not fit the pool."""
        assert sum(self.quotas.values()) == self._allocator.num_slabs or not self.quotas
        assert sum(self.floors.values()) <= self._allocator.num_slabs
        for model, floor in self.floors.items():
            assert 0 <= floor <= self.quotas[model]


class OpenPool(KVQuotas):
    """No quotas: whoever comes first takes what is free, as in a server without quotas.

    A baseline. Each model's quota is the whole pool and stays so.
    """

    reclaims = False

    def _parts(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        floors, _ = super()._parts(specs, needs)  # refuses a pool that is too small
        return dict.fromkeys(floors, 0), dict.fromkeys(floors, self._allocator.num_slabs)

    def due(self, now: float) -> bool:
        """Never: nothing moves."""
        self._now = now
        return False

    def check_invariants(self) -> None:
        """Raises AssertionError if the pool is divided after all."""
        assert set(self.quotas.values()) <= {self._allocator.num_slabs}
        assert not any(self.floors.values())


def slabs_for_request(spec: ModelSpec, allocator: SlabAllocator, num_tokens: int) -> int:
    """Slabs that one request takes when it has grown to so many tokens, packed."""
    return allocator.slabs_for(spec.name, spec.blocks_for(num_tokens))


def compute_floors(specs: Iterable[ModelSpec], allocator: SlabAllocator) -> dict[str, int]:
    """Guaranteed slabs of each model.

    A floor that is not given is an equal part of `DEFAULT_FLOORS` of the pool, at most one request
    of full length, and as small as it takes to leave room for such a request of every other model.

    Raises:
      PoolTooSmall: a request of full length does not fit beside the floors of the other models.
    """
    specs = list(specs)
    slabs = allocator.num_slabs
    needs = {spec.name: slabs_for_request(spec, allocator, spec.max_model_len) for spec in specs}
    floors = {
        spec.name: int(spec.kv_floor * slabs + 1e-9) for spec in specs if spec.kv_floor is not None
    }
    _check_room(specs, allocator, needs, floors)

    defaults = {
        spec.name: min(needs[spec.name], int(DEFAULT_FLOORS * slabs) // len(specs))
        for spec in specs
        if spec.kv_floor is None
    }
    scale = 1.0
    for name, need in needs.items():
        given = sum(floor for other, floor in floors.items() if other != name)
        wanted = sum(floor for other, floor in defaults.items() if other != name)
        if wanted:
            scale = min(scale, (slabs - need - given) / wanted)
    floors.update({name: int(floor * scale) for name, floor in defaults.items()})
    return {spec.name: floors[spec.name] for spec in specs}


def _check_room(
    specs: Sequence[ModelSpec],
    allocator: SlabAllocator,
    needs: Mapping[str, int],
    floors: Mapping[str, int],
) -> None:
    for spec in specs:
        others = sum(floor for name, floor in floors.items() if name != spec.name)
        left = allocator.num_slabs - others
        if needs[spec.name] > left:
            pages = allocator.slab_pages
            beside = f" beside the kv_floor of other models ({others * pages})" if others else ""
            remedy = "raise `pool.memory`, lower its `max_model_len`"
            remedy += ", or lower the other models' `kv_floor`" if others else ""
            raise PoolTooSmall(
                f"pool too small: {spec.name} needs {needs[spec.name] * pages} pages for one "
                f"{spec.max_model_len}-token request, and {left * pages} of "
                f"{allocator.num_pages} are left for it{beside}; {remedy}"
            )


def apportion(total: int, weights: Sequence[float], minima: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to weights, each at least its minimum, that sum to `total`.

    Weights that are all zero count as equal.

    Raises:
      ValueError: the minima alone exceed the total.
    """
    if sum(minima) > total:
        raise ValueError(f"minima {list(minima)} exceed the total of {total}")
    if not weights:
        return []
    if not any(weights):
        weights = [1.0] * len(weights)
    # Those whose proportional part is under their minimum get the minimum, the rest share the rest.
    at_minimum: set[int] = set()
    while True:
        rest = total - sum(minima[i] for i in at_minimum)
        weight = sum(w for i, w in enumerate(weights) if i not in at_minimum)
        exact = [
            minima[i] if i in at_minimum else (rest * w / weight if weight else 0.0)
            for i, w in enumerate(weights)
        ]
        under = {i for i, value in enumerate(exact) if i not in at_minimum and value < minima[i]}
        if not under:
            break
        at_minimum |= under
    parts = [max(minima[i], int(value)) for i, value in enumerate(exact)]
    by_fraction = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    index = 0
    while sum(parts) < total:
        parts[by_fraction[index % len(parts)]] += 1
        index += 1
    return parts
