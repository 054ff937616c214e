"""Concurrent policies, with steps that end in any order."""

from __future__ import annotations

import pytest

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent import create_concurrent_policy
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step
from tests.muxjax.scheduling.harness import request, spec
from tests.placement.simulator.harness import finish_step, schedule_steps, step_key


def build_scheduler(
    policy: str, prefill: float = 0.8, decode: float = 0.4, num_pages: int = 200
) -> Scheduler:
    shares = {
        (name, phase): prefill if phase == "prefill" else decode
        for name in ("a", "b")
        for phase in ("prefill", "decode")
    }
    return Scheduler(
        [spec("a"), spec("b")],
        num_pages,
        create_concurrent_policy(policy, ComputeShares(shares)),
        kv_quotas=OpenPool,
        concurrent=True,
    )


@pytest.mark.parametrize("policy", ["adbs", "round_robin"])
def test_prefills_alternate_while_decodes_run_concurrently(policy: str) -> None:
    scheduler = build_scheduler(policy)
    for number, model in enumerate("ab"):
        scheduler.add(request(number, model, max_tokens=20))
    (first,) = schedule_steps(scheduler)
    assert step_key(first) == ("a", "prefill")  # one prefill at a time
    finish_step(scheduler, first)
    second, third = schedule_steps(scheduler)
    assert step_key(second) == ("b", "prefill")
    assert step_key(third) == ("a", "decode")
    finish_step(scheduler, second)  # before the decode, which was scheduled later
    (fourth,) = schedule_steps(scheduler)
    assert step_key(fourth) == ("b", "decode")
    assert scheduler.in_flight_keys() == [("a", "decode"), ("b", "decode")]


def test_no_decode_starts_while_a_prefill_waits_for_compute() -> None:
    scheduler = build_scheduler("adbs", prefill=1.0)
    scheduler.add(request(0, "a", max_tokens=20))
    finish_step(scheduler, schedule_steps(scheduler)[0])
    (decode,) = schedule_steps(scheduler)
    assert step_key(decode) == ("a", "decode")
    scheduler.add(request(1, "b", max_tokens=20))
    assert schedule_steps(scheduler) == []  # the decode runs; the prefill is next
    finish_step(scheduler, decode)
    (prefill,) = schedule_steps(scheduler)
    assert step_key(prefill) == ("b", "prefill")


def test_a_prefill_blocked_by_pages_does_not_delay_decodes() -> None:
    scheduler = build_scheduler("adbs", prefill=1.0, num_pages=40)
    scheduler.add(request(0, "a", prompt_tokens=50, max_tokens=10))
    scheduler.add(request(1, "b", prompt_tokens=50, max_tokens=10))
    for _ in range(6):  # the prompts take several chunks
        for step in schedule_steps(scheduler):
            finish_step(scheduler, step)
        if scheduler.models["a"].running:
            break
    (decode,) = schedule_steps(scheduler)
    assert step_key(decode) == ("a", "decode")
    assert scheduler.models["b"].waiting
    finish_step(scheduler, decode)
    (decode,) = schedule_steps(scheduler)
    assert step_key(decode) == ("a", "decode")


def test_fcfs_does_not_reorder_requests() -> None:
    scheduler = build_scheduler("fcfs", decode=1.0)
    for number, model in enumerate("ba"):
        scheduler.add(request(number, model, max_tokens=20))
    (first,) = schedule_steps(scheduler)
    assert step_key(first) == ("b", "prefill")
    finish_step(scheduler, first)
    (second,) = schedule_steps(scheduler)
    assert step_key(second) == ("a", "prefill")  # prefills first
    finish_step(scheduler, second)
    (third,) = schedule_steps(scheduler)
    assert step_key(third) == ("b", "decode")  # the model of the oldest request, on the full chip
    finish_step(scheduler, third)
    (fourth,) = schedule_steps(scheduler)
    assert step_key(fourth) == ("b", "decode")


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
def test_all_requests_finish(policy: str) -> None:
    scheduler = build_scheduler(policy, num_pages=80)
    for number in range(12):
        scheduler.add(request(number, "ab"[number % 2], prompt_tokens=5 + number, max_tokens=15))
    in_flight: list[Step] = []
    for turn in range(2000):
        in_flight += schedule_steps(scheduler, now=turn * 0.01)
        if not in_flight:
            break
        finish_step(scheduler, in_flight.pop(turn % len(in_flight)), now=turn * 0.01)
    assert scheduler.num_requests == 0
    assert sum(state.finished for state in scheduler.models.values()) == 12


def test_a_policy_without_concurrent_variant_raises() -> None:
    with pytest.raises(ValueError, match="no policy 'none'; there are slo, adbs"):
        create_concurrent_policy("none", ComputeShares({}))
    with pytest.raises(ValueError, match="available: slo, adbs, fcfs, round_robin, static"):
        create_concurrent_policy("mutex", ComputeShares({}))
