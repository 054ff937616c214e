"""Blocked requests; `test_manager.py` and `test_reclaim.py` test them with a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from muxjax.scheduling.in_flight_steps import InFlightSteps
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.blocked_requests import RECLAIM_STEPS, BlockedRequests
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.requests import Request
from muxjax.scheduling.steps import Prefill
from tests.muxjax.scheduling.harness import request, spec


@dataclass
class Unit:
    """Models of one layer with quotas of ten slabs each, of which `a` leases all but one."""

    allocator: SlabAllocator
    quotas: KVQuotas
    in_flight: InFlightSteps
    blocked: BlockedRequests
    models: dict[str, ModelState]

    def wait(self, model: str, order: int) -> Request:
        waiting = request(order, model)
        waiting.order = order
        self.models[model].enqueue(waiting)
        return waiting

    def make_steps(self, count: int) -> None:
        for _ in range(count):
            step = Prefill("a", [])
            self.in_flight.begin(step, ("a", "prefill"), 0.0, [])
            self.in_flight.end(step)


@pytest.fixture
def unit() -> Unit:
    specs = [spec(name, 1, 4, 40, kv_floor=0.1) for name in "ab"]
    allocator = SlabAllocator(1 + 20, {"a": 1, "b": 1})
    quotas = KVQuotas(specs, allocator, {"a": 1.0, "b": 1.0})
    in_flight = InFlightSteps(concurrent=False)
    allocator.allocate("a", 19)
    blocked = BlockedRequests(allocator, quotas, in_flight)
    models = {model.name: ModelState(model) for model in specs}
    return Unit(allocator, quotas, in_flight, blocked, models)


def block(unit: Unit, waiting: Request, queue_class: int = 1, **options: bool) -> None:
    settings = {"over_quota": False, "no_victims": False} | options
    unit.blocked.add(waiting, 3, queue_class=queue_class, **settings)


def test_a_request_is_blocked_until_something_changes(unit: Unit) -> None:
    state = unit.models["b"]
    assert not unit.blocked.is_blocked(state)
    waiting = unit.wait("b", 1)
    block(unit, waiting)
    assert len(unit.blocked.by_model) == 1
    assert unit.blocked.is_blocked(state)
    unit.blocked.record_release("a")  # says nothing by itself: the slabs count
    assert unit.blocked.is_blocked(state)
    unit.blocked.record_release("b")
    assert not unit.blocked.is_blocked(state)
    block(unit, waiting)
    assert unit.blocked.is_blocked(state)
    unit.blocked.forget(waiting)
    assert len(unit.blocked.by_model) == 0
    assert not unit.blocked.is_blocked(state)


def test_a_model_is_overdue_after_some_steps_and_tried_again(unit: Unit) -> None:
    waiting = unit.wait("b", 1)
    block(unit, waiting)
    unit.make_steps(RECLAIM_STEPS - 1)
    assert not unit.blocked.is_overdue("b")
    assert unit.blocked.is_blocked(unit.models["b"])
    unit.make_steps(1)
    assert unit.blocked.is_overdue("b")
    assert not unit.blocked.is_blocked(unit.models["b"])


def test_time_in_class_two_does_not_count(unit: Unit) -> None:
    waiting = unit.wait("b", 1)
    block(unit, waiting, queue_class=2)
    unit.make_steps(RECLAIM_STEPS)
    assert not unit.blocked.is_overdue("b")
    block(unit, waiting)
    assert not unit.blocked.is_overdue("b")


def test_requests_behind_a_blocked_one_keep_to_their_quota_or_floor(unit: Unit) -> None:
    first, later = unit.wait("b", 1), unit.wait("a", 2)
    assert unit.blocked.slab_limit(later, 1) == 20
    block(unit, first)
    assert unit.blocked.slab_limit(later, 1) == unit.quotas.quotas["a"] == 10
    assert unit.blocked.slab_limit(later, 0) == 20  # ahead of it
    block(unit, first, over_quota=True)
    assert unit.blocked.slab_limit(later, 1) == unit.quotas.floors["a"] == 2
    block(unit, first, queue_class=2)
    assert unit.blocked.slab_limit(later, 1) == 20


def test_a_model_that_the_policy_stopped_scheduling_is_skipped(unit: Unit) -> None:
    first, later = unit.wait("b", 1), unit.wait("a", 2)
    block(unit, first)
    unit.make_steps(RECLAIM_STEPS + 1)
    assert unit.blocked.slab_limit(later, 1) == 20
    unit.blocked.is_blocked(unit.models["b"])
    assert unit.blocked.slab_limit(later, 1) == 10
