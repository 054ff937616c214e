"""The concurrent variant of `slo`."""

from __future__ import annotations

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent_slo import ConcurrentSlo
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.scheduler import Scheduler
from tests.muxjax.scheduling.harness import request, spec
from tests.placement.simulator.harness import finish_step, schedule_steps, step_key

SHARES = {("a", "prefill"): 0.6, ("a", "decode"): 0.6, ("b", "prefill"): 0.4, ("b", "decode"): 0.4}


def test_a_model_added_later_gets_a_tracker() -> None:
    policy = ConcurrentSlo(ComputeShares(SHARES))
    scheduler = Scheduler([spec("a")], 200, policy, kv_quotas=OpenPool, concurrent=True)
    scheduler.add(request(0, "a", max_tokens=20))
    (prefill,) = schedule_steps(scheduler)
    scheduler.add_model(spec("b"))
    scheduler.add(request(1, "b", max_tokens=20))
    (second,) = schedule_steps(scheduler)
    assert step_key(second) == ("b", "prefill")
    finish_step(scheduler, prefill)
    finish_step(scheduler, second)
    assert [step_key(step) for step in schedule_steps(scheduler)] == [
        ("a", "decode"),
        ("b", "decode"),
    ]


def test_prompts_wait_only_for_decodes_of_the_same_model() -> None:
    policy = ConcurrentSlo(ComputeShares(SHARES))
    scheduler = Scheduler([spec("a"), spec("b")], 200, policy, kv_quotas=OpenPool, concurrent=True)
    scheduler.add(request(0, "a", max_tokens=20))
    (prefill,) = schedule_steps(scheduler)
    finish_step(scheduler, prefill)
    scheduler.add(request(1, "b", max_tokens=20))
    steps = schedule_steps(scheduler)
    assert [step_key(step) for step in steps] == [("b", "prefill"), ("a", "decode")]
    assert schedule_steps(scheduler) == []  # a model runs one step at a time


def test_a_single_active_model_borrows_the_full_chip_for_one_step() -> None:
    compute = ComputeShares(SHARES)
    scheduler = Scheduler(
        [spec("a"), spec("b")], 200, ConcurrentSlo(compute), kv_quotas=OpenPool, concurrent=True
    )
    scheduler.add(request(0, "a", max_tokens=20))
    (first,) = schedule_steps(scheduler)
    assert compute.allocated(("a", "prefill")) == 1.0
    scheduler.add(request(1, "b", max_tokens=20))
    (second,) = schedule_steps(scheduler)  # at once, although its share is lent
    assert compute.allocated(("b", "prefill")) == 0.4
    finish_step(scheduler, first)
    (decode,) = schedule_steps(scheduler)
    assert step_key(decode) == ("a", "decode")
    assert compute.allocated(("a", "decode")) == 0.6  # nothing is lent while b is active
    finish_step(scheduler, second)
