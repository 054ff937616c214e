"""Quotas: the slabs of the pool that each model may lease (MuxServe, section 3.3, plus floors).

Each model has a guaranteed *floor* and a *quota*. Both count slabs, the unit of leasing.

Invariants, which `check_invariants` tests: a quota is at least its model's floor, and the quotas of
all models add up to the pool.

- Up to its quota, a model may lease every free slab.
- Above its quota, a model borrows: it may lease only the free slabs that other models do not need
  to reach their floors.
- Other models reclaim borrowed slabs by preemption (`manager.py` says when, `preemption.py` from
  which requests).
- Every `QUOTA_PERIOD` seconds, quota moves from models that leased less than `WELL_USED` of their
  quota to models that were refused slabs at their quota. If all models are short, quota moves back
  towards the initial quotas, which are in proportion to the expected need.

MuxServe calls the pool fair if models use it in proportion to their needs (`R` in the paper). The
*normalized use* of a model is its fraction of the leased slabs over its fraction of the expected
need. Quota moves towards equal normalized use wherever all models could use more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.apportion import apportion
from muxjax.scheduling.kv_cache.floors import compute_floors
from muxjax.scheduling.kv_cache.quota_records import MoveReason, QuotaMove, Reclaim, ReclaimReason
from muxjax.scheduling.specs import ModelSpec

QUOTA_PERIOD = 3.0
"""Time between moves of quota, in seconds."""
WELL_USED = 0.9
"""Fraction of its quota below which a model may lose quota (MuxServe's threshold)."""
RECORDS_KEPT = 32
"""Number of moves, and of reclaims, that the statistics show."""


class KVQuotas:
    """Floors and quotas of a unit's models.

    Args:
      specs: the models.
      allocator: the pool; the quotas limit its leases.
      needs: expected need of pages of each model, in any common unit. Initial quotas are in
        proportion to it.

    Raises:
      PoolTooSmall: a request of full length of some model could never run.

    Attributes:
      reclaims: whether pages that a model borrowed can be reclaimed for another model's quota.
      floors, quotas: slabs of each model.
      initial_quotas: quotas in proportion to the expected need.
      version: increases whenever quotas may have changed.
      moves: the last transfers of quota.
      reclaimed: the last reclaims.
      pages_lost, pages_gained: pages that each model lost and gained by reclaims, in total.
    """

    reclaims = True

    def __init__(
        self, specs: Iterable[ModelSpec], allocator: SlabAllocator, needs: Mapping[str, float]
    ) -> None:
        self._allocator = allocator
        self.version = 0
        self.moves: deque[QuotaMove] = deque(maxlen=RECORDS_KEPT)
        self.reclaimed: deque[Reclaim] = deque(maxlen=RECORDS_KEPT)
        self.pages_lost: dict[str, int] = {}
        self.pages_gained: dict[str, int] = {}
        self._now = 0.0
        self._refused_at_quota: set[str] = set()
        self._next_move: float | None = None
        self.divide(specs, needs)

    def divide(self, specs: Iterable[ModelSpec], needs: Mapping[str, float]) -> None:
        """Sets the floors and initial quotas of these models, which replace all earlier ones.

        A model that holds more than its new quota has borrowed the difference.

        Raises:
          PoolTooSmall: a request of full length of some model could never run. Nothing is changed.
        """
        specs = list(specs)
        floors, quotas = self._compute_floors_and_quotas(specs, needs)
        self.floors, self.initial_quotas, self.quotas = floors, dict(quotas), quotas
        names = [spec.name for spec in specs]
        total = sum(max(0.0, needs[name]) for name in names)
        self._need_shares = {
            name: max(0.0, needs[name]) / total if total else 1.0 / len(names) for name in names
        }
        self._peaks = {name: self._allocator.leased_slabs(name) for name in names}
        for name in names:
            self.pages_lost.setdefault(name, 0)
            self.pages_gained.setdefault(name, 0)
        self._refused_at_quota.intersection_update(names)
        self._unfilled = 0
        self._unfilled_version = -1  # the `SlabAllocator.lease_version` of `_unfilled`
        self.version += 1

    def _compute_floors_and_quotas(
        self, specs: Sequence[ModelSpec], needs: Mapping[str, float]
    ) -> tuple[dict[str, int], dict[str, int]]:
        floors = compute_floors(specs, self._allocator)
        weights = [max(0.0, needs[spec.name]) for spec in specs]
        quotas = apportion(self._allocator.num_slabs, weights, list(floors.values()))
        return floors, dict(zip(floors, quotas, strict=True))

    # Leases

    def leasable(self, model: str) -> int:
        """Number of slabs that the model may lease now."""
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
        """Number of slabs that the model leases above its quota; negative below it."""
        return self._allocator.leased_slabs(model) - self.quotas[model]

    def over_floor(self, model: str) -> int:
        """Number of slabs that the model leases above its floor; negative below it."""
        return self._allocator.leased_slabs(model) - self.floors[model]

    def spare_slabs(self, model: str) -> int:
        """Number of slabs within the model's quota that no other model needs to reach its floor."""
        leased = self._allocator.leased_slabs(model)
        free = self._allocator.free_slabs - self._unfilled_floors(model, leased)
        return max(0, min(self.quotas[model] - leased, free))

    def record_lease(self, model: str) -> None:
        """Updates the model's peak use; call after each allocation, so that short peaks count."""
        leased = self._allocator.leased_slabs(model)
        if leased > self._peaks[model]:
            self._peaks[model] = leased

    def record_refusal(self, model: str, slabs: int) -> None:
        """Records that the model was refused `slabs` slabs, if they would exceed its quota."""
        if self._allocator.leased_slabs(model) + slabs > self.quotas[model]:
            self._refused_at_quota.add(model)

    def record_reclaim(
        self, donor: str, recipient: str, slabs: int, requests: int, reason: ReclaimReason
    ) -> None:
        """Records that requests of `donor` were preempted to free slabs for `recipient`."""
        pages = slabs * self._allocator.slab_pages
        self.pages_lost[donor] += pages
        self.pages_gained[recipient] += pages
        self.reclaimed.append(Reclaim(self._now, donor, recipient, pages, requests, reason))

    # Use

    def peak_use(self, model: str) -> float:
        """Largest fraction of its quota that the model leased since the last moves."""
        peak = self._peaks[model]
        return peak / self.quotas[model] if self.quotas[model] else float(peak > 0)

    def normalized_use(self, model: str) -> float:
        """The model's fraction of the leased slabs over its fraction of the expected need.

        1 is use in proportion to the need. Infinite for a model that leases slabs and has no need.
        """
        leased = self._allocator.leased_slabs(model)
        if not leased:
            return 0.0
        in_use = self._allocator.num_slabs - self._allocator.free_slabs
        need = self._need_shares[model]
        return leased / in_use / need if need else math.inf

    # Moves of quota

    def due(self, now: float) -> bool:
        """Whether to `move` quota now. Call before each step, since `now` also dates reclaims."""
        self._now = now
        if self._next_move is None:
            self._next_move = now + QUOTA_PERIOD
        return now >= self._next_move

    def move(self, now: float, queued: Iterable[str]) -> None:
        """Moves unused quota to models that were refused slabs at their quota.

        Args:
          now: time, in seconds.
          queued: models with waiting requests. Other models get no quota, since they need none.
        """
        self._next_move = now + QUOTA_PERIOD
        self.version += 1
        recipients = [model for model in queued if model in self._refused_at_quota]
        if recipients:
            self._move_to(recipients, now)
        self._refused_at_quota.clear()
        for model in self._peaks:
            self._peaks[model] = self._allocator.leased_slabs(model)

    def _move_to(self, recipients: Sequence[str], now: float) -> None:
        surplus: dict[str, int] = {}
        reason: MoveReason = "unused"
        for model, quota in self.quotas.items():
            peak = self._peaks[model]
            if model not in recipients and peak < WELL_USED * quota:
                unused = quota - max(self.floors[model], math.ceil(peak / WELL_USED))
                surplus[model] = -(-unused // 2)
        if not any(amount > 0 for amount in surplus.values()):
            # All quotas are well used: models above their initial quota return some of it.
            reason = "expected need"
            recipients = [
                model for model in recipients if self.quotas[model] < self.initial_quotas[model]
            ]
            for model, quota in self.quotas.items():
                above = quota - max(self.floors[model], self.initial_quotas[model])
                surplus[model] = -(-above // 2) if above > 0 else 0
        if not recipients:
            return
        # `apportion` rounds in favor of the first: the model furthest below its initial quota.
        below = {model: self.initial_quotas[model] - self.quotas[model] for model in recipients}
        recipients = sorted(recipients, key=lambda model: -below[model])
        use = {model: self.peak_use(model) for model in self.quotas}
        for donor, amount in surplus.items():
            parts = apportion(max(0, amount), [1.0] * len(recipients), [0] * len(recipients))
            for recipient, slabs in zip(recipients, parts, strict=True):
                if slabs:
                    self.quotas[donor] -= slabs
                    self.quotas[recipient] += slabs
                    pages = slabs * self._allocator.slab_pages
                    self.moves.append(
                        QuotaMove(now, donor, recipient, pages, reason, use[donor], use[recipient])
                    )

    def _unfilled_floors(self, model: str, leased: int) -> int:
        """Number of slabs that the other models lack to reach their floors.

        Args:
          model: the model to leave out.
          leased: slabs that it leases.
        """
        version = self._allocator.lease_version
        # The sum over all models is cached: policies read it for each model before each step.
        if self._unfilled_version != version:
            self._unfilled_version = version
            leased_slabs = self._allocator.leased_slabs
            missing = [floor - leased_slabs(other) for other, floor in self.floors.items()]
            self._unfilled = sum([slabs for slabs in missing if slabs > 0])
        floor = self.floors[model]
        return self._unfilled - (floor - leased if floor > leased else 0)

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if quotas and floors do not fit the pool."""
        assert sum(self.quotas.values()) == self._allocator.num_slabs or not self.quotas
        assert sum(self.floors.values()) <= self._allocator.num_slabs
        for model, floor in self.floors.items():
            assert 0 <= floor <= self.quotas[model]
