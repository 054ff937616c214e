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
class Setup:
    """Models of one layer with quotas of ten slabs each; `a` leases 19 of all 20 slabs."""

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

    def run_steps(self, count: int) -> None:
        for _ in range(count):
            step = Prefill("a", [])
            self.in_flight.begin(step, ("a", "prefill"), 0.0, [])
            self.in_flight.end(step)


@pytest.fixture
def setup() -> Setup:
    specs = [spec(name, 1, 4, 40, kv_floor=0.1) for name in "ab"]
    allocator = SlabAllocator(1 + 20, {"a": 1, "b": 1})
    quotas = KVQuotas(specs, allocator, {"a": 1.0, "b": 1.0})
    in_flight = InFlightSteps(concurrent=False)
    allocator.allocate("a", 19)
    blocked = BlockedRequests(allocator, quotas, in_flight)
    models = {model.name: ModelState(model) for model in specs}
    return Setup(allocator, quotas, in_flight, blocked, models)


def block(setup: Setup, waiting: Request, queue_class: int = 1, **options: bool) -> None:
    settings = {"over_quota": False, "no_victims": False} | options
    setup.blocked.add(waiting, 3, queue_class=queue_class, **settings)


def test_a_request_is_blocked_until_something_changes(setup: Setup) -> None:
    state = setup.models["b"]
    assert not setup.blocked.is_blocked(state)
    waiting = setup.wait("b", 1)
    block(setup, waiting)
    assert len(setup.blocked.by_model) == 1
    assert setup.blocked.is_blocked(state)
    setup.blocked.record_release("a")  # no effect without free slabs
    assert setup.blocked.is_blocked(state)
    setup.blocked.record_release("b")
    assert not setup.blocked.is_blocked(state)
    block(setup, waiting)
    assert setup.blocked.is_blocked(state)
    setup.blocked.forget(waiting)
    assert len(setup.blocked.by_model) == 0
    assert not setup.blocked.is_blocked(state)


def test_a_model_is_overdue_after_some_steps_and_tried_again(setup: Setup) -> None:
    waiting = setup.wait("b", 1)
    block(setup, waiting)
    setup.run_steps(RECLAIM_STEPS - 1)
    assert not setup.blocked.is_overdue("b")
    assert setup.blocked.is_blocked(setup.models["b"])
    setup.run_steps(1)
    assert setup.blocked.is_overdue("b")
    assert not setup.blocked.is_blocked(setup.models["b"])


def test_time_in_class_two_does_not_count(setup: Setup) -> None:
    waiting = setup.wait("b", 1)
    block(setup, waiting, queue_class=2)
    setup.run_steps(RECLAIM_STEPS)
    assert not setup.blocked.is_overdue("b")
    block(setup, waiting)
    assert not setup.blocked.is_overdue("b")


def test_requests_behind_a_blocked_one_keep_to_their_quota_or_floor(setup: Setup) -> None:
    first, later = setup.wait("b", 1), setup.wait("a", 2)
    assert setup.blocked.slab_limit(later, 1) == 20
    block(setup, first)
    assert setup.blocked.slab_limit(later, 1) == setup.quotas.quotas["a"] == 10
    assert setup.blocked.slab_limit(later, 0) == 20  # ahead of it
    block(setup, first, over_quota=True)
    assert setup.blocked.slab_limit(later, 1) == setup.quotas.floors["a"] == 2
    block(setup, first, queue_class=2)
    assert setup.blocked.slab_limit(later, 1) == 20


def test_a_model_that_the_policy_stopped_scheduling_is_skipped(setup: Setup) -> None:
    first, later = setup.wait("b", 1), setup.wait("a", 2)
    block(setup, first)
    setup.run_steps(RECLAIM_STEPS + 1)
    assert setup.blocked.slab_limit(later, 1) == 20
    setup.blocked.is_blocked(setup.models["b"])
    assert setup.blocked.slab_limit(later, 1) == 10
