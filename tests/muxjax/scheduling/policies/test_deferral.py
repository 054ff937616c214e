from __future__ import annotations

import pytest

from muxjax.scheduling.policies.deferral import FEW, MINOR_PART, TURNS, DeferralQueue
from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import LatencySlo
from tests.muxjax.scheduling.harness import Loop, request, spec

MANY = 8 * FEW


def crowd(**deferred: int) -> tuple[Scheduler, DeferralQueue]:
    """Models with so many deferred requests each, and one of `a` that runs and may be in time."""
    targets = LatencySlo(scale=1e6)
    specs = [spec(name, 1, 16, 64, targets=targets) for name in ("a", *deferred)]
    loop = Loop.of(specs, 4000, "slo")
    unit = loop.unit
    unit.add(request(0, "a", max_tokens=50))
    while not unit.models["a"].running:
        loop.turn()
    number = 1
    for name, count in deferred.items():
        for _ in range(count):
            unit.add(request(number, name))
            unit.defer(unit.request(number) or request(number))
            number += 1
    return unit, DeferralQueue(
        [SloTracker(state, unit.estimates) for state in unit.models.values()]
    )


def came_back(unit: Scheduler, lost: DeferralQueue, model: str, now: float = 0.0) -> list[Request]:
    lost.look(unit, SloUtilization(), now)
    return list(unit.models[model].waiting.values())


def test_a_few_come_back_as_soon_as_nobody_waits() -> None:
    unit, lost = crowd(b=FEW)
    assert len(came_back(unit, lost, "b")) == FEW
    unit, lost = crowd(b=FEW)
    unit.add(request(100, "b"))
    assert [one.id for one in came_back(unit, lost, "b")] == [100]


def test_many_wait_until_none_is_left_that_may_be_in_time() -> None:
    unit, lost = crowd(b=MANY)
    assert came_back(unit, lost, "b") == []
    unit.cancel(0)
    most = unit.models["b"].spec.limits.max_prefill_seqs
    assert [one.id for one in came_back(unit, lost, "b")] == list(range(1, 1 + most))
    # Those that came back are not in anybody's way, but they go first.
    assert len(came_back(unit, lost, "b")) == most


def test_nobody_waits_for_the_end_of_a_very_long_request() -> None:
    unit, lost = crowd(b=MANY)
    pace = SloTracker(unit.models["a"], unit.estimates)
    assert came_back(unit, lost, "b", now=0.9 * pace.allowed()) == []
    assert came_back(unit, lost, "b", now=1.1 * pace.allowed())


def test_one_comes_back_for_so_many_that_end() -> None:
    unit, lost = crowd(b=MANY, c=MANY)
    for ends in range(1, 2 * TURNS + 1):
        unit.add(request(1000 + ends, "a"))
        unit.cancel(1000 + ends)
        assert len(came_back(unit, lost, "b")) == ends // TURNS
    # Those of `b` came before those of `c`.
    assert not unit.models["c"].waiting


@pytest.mark.parametrize(("own", "back"), [(2, 2), (5, 0)])
def test_a_model_that_has_hardly_any_does_not_wait_for_who_has_too_many(
    own: int, back: int
) -> None:
    unit, lost = crowd(b=round(2 / MINOR_PART), c=own)
    assert len(came_back(unit, lost, "c")) == back
    assert not unit.models["b"].waiting
