from __future__ import annotations

import pytest

from muxjax.scheduling.policies.deferral import DeferralQueue
from muxjax.scheduling.policies.interface import Defer
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_tuning import DEFAULT_TUNING
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo
from tests.muxjax.scheduling.harness import Loop, request, spec

FEW = DEFAULT_TUNING.few_requests
MANY = 8 * FEW


def overloaded(**deferred: int) -> tuple[Scheduler, DeferralQueue]:
    """Models with deferred requests, and one request of `a` that runs and may be in time."""
    targets = LatencySlo(scale=1e6)
    specs = [spec(name, 1, 16, 64, targets=targets) for name in ("a", *deferred)]
    loop = Loop.create(specs, 4000, "slo")
    scheduler = loop.scheduler
    scheduler.add(request(0, "a", max_tokens=50))
    while not scheduler.models["a"].running:
        loop.turn()
    number = 1
    for name, count in deferred.items():
        for _ in range(count):
            scheduler.add(request(number, name))
            scheduler.defer(scheduler.get_request(number) or request(number))
            number += 1
    return scheduler, DeferralQueue(
        [SloTracker(state, scheduler.estimates) for state in scheduler.models.values()]
    )


def waiting_after(
    scheduler: Scheduler, queue: DeferralQueue, model: str, now: float = 0.0
) -> list[Request]:
    """A model's waiting requests after one round of deferrals and recalls."""
    for change in queue.propose(scheduler, SloUtilization(), now):
        if isinstance(change, Defer):
            scheduler.defer(change.request)
        else:
            scheduler.recall(change.model)
    return list(scheduler.models[model].waiting.values())


def test_few_deferred_requests_are_recalled_as_soon_as_none_waits() -> None:
    scheduler, queue = overloaded(b=FEW)
    assert len(waiting_after(scheduler, queue, "b")) == FEW
    scheduler, queue = overloaded(b=FEW)
    scheduler.add(request(100, "b"))
    assert [req.id for req in waiting_after(scheduler, queue, "b")] == [100]


def test_many_deferred_requests_wait_until_no_feasible_one_is_left() -> None:
    scheduler, queue = overloaded(b=MANY)
    assert waiting_after(scheduler, queue, "b") == []
    scheduler.cancel(0)
    limit = scheduler.models["b"].spec.limits.max_prefill_seqs
    assert [req.id for req in waiting_after(scheduler, queue, "b")] == list(range(1, 1 + limit))
    # Recalled requests are not feasible, but they go before the deferred ones.
    assert len(waiting_after(scheduler, queue, "b")) == limit


def test_a_very_long_request_does_not_count_as_feasible_to_its_end() -> None:
    scheduler, queue = overloaded(b=MANY)
    tracker = SloTracker(scheduler.models["a"], scheduler.estimates)
    assert waiting_after(scheduler, queue, "b", now=0.9 * tracker.allowed_latency()) == []
    assert waiting_after(scheduler, queue, "b", now=1.1 * tracker.allowed_latency())


def test_deferred_request_is_recalled_after_each_interval_of_finished_requests() -> None:
    scheduler, queue = overloaded(b=MANY, c=MANY)
    for ends in range(1, 2 * DEFAULT_TUNING.recall_interval + 1):
        scheduler.add(request(1000 + ends, "a"))
        scheduler.cancel(1000 + ends)
        assert len(waiting_after(scheduler, queue, "b")) == ends // DEFAULT_TUNING.recall_interval
    # Those of `b` arrived before those of `c`.
    assert not scheduler.models["c"].waiting


@pytest.mark.parametrize(("deferred", "recalled"), [(2, 2), (5, 0)])
def test_a_model_with_few_deferred_requests_recalls_them_at_once(
    deferred: int, recalled: int
) -> None:
    scheduler, queue = overloaded(b=round(2 / DEFAULT_TUNING.minor_part), c=deferred)
    assert len(waiting_after(scheduler, queue, "c")) == recalled
    assert not scheduler.models["b"].waiting
