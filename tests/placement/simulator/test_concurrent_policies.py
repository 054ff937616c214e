"""Concurrent steps, applied by hand in any order."""

from __future__ import annotations

import pytest

from muxjax.placement.simulator.compute_shares import ComputeShares
from muxjax.placement.simulator.concurrent import create_concurrent_policy
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.steps import Step
from tests.muxjax.scheduling.harness import request, spec
from tests.placement.simulator.harness import finish, kind, started


def unit(policy: str, prefill: float = 0.8, decode: float = 0.4, num_pages: int = 200) -> Scheduler:
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
def test_prefills_take_turns_and_decodes_run_beside_them(policy: str) -> None:
    found = unit(policy)
    for number, model in enumerate("ab"):
        found.add(request(number, model, max_tokens=20))
    (first,) = started(found)
    assert kind(first) == ("a", "prefill")  # one prefill at a time
    finish(found, first)
    second, third = started(found)
    assert kind(second) == ("b", "prefill")
    assert kind(third) == ("a", "decode")
    finish(found, second)  # before the decode, which was made later
    (fourth,) = started(found)
    assert kind(fourth) == ("b", "decode")
    assert found.in_flight_keys() == [("a", "decode"), ("b", "decode")]


def test_decodes_wait_while_a_prefill_waits_for_the_chip() -> None:
    found = unit("adbs", prefill=1.0)
    found.add(request(0, "a", max_tokens=20))
    finish(found, started(found)[0])
    (decode,) = started(found)
    assert kind(decode) == ("a", "decode")
    found.add(request(1, "b", max_tokens=20))
    assert started(found) == []  # the decode still runs; nothing new may start before the prefill
    finish(found, decode)
    (prefill,) = started(found)
    assert kind(prefill) == ("b", "prefill")


def test_a_prefill_that_was_refused_pages_delays_no_decode() -> None:
    found = unit("adbs", prefill=1.0, num_pages=40)
    found.add(request(0, "a", prompt_tokens=50, max_tokens=10))
    found.add(request(1, "b", prompt_tokens=50, max_tokens=10))
    for _ in range(6):  # the prompts take several chunks
        for step in started(found):
            finish(found, step)
        if found.models["a"].running:
            break
    (decode,) = started(found)
    assert kind(decode) == ("a", "decode")
    assert found.models["b"].waiting
    finish(found, decode)
    (decode,) = started(found)
    assert kind(decode) == ("a", "decode")


def test_fcfs_is_not_overtaken() -> None:
    found = unit("fcfs", decode=1.0)
    for number, model in enumerate("ba"):
        found.add(request(number, model, max_tokens=20))
    (first,) = started(found)
    assert kind(first) == ("b", "prefill")
    finish(found, first)
    (second,) = started(found)
    assert kind(second) == ("a", "prefill")  # prefills first
    finish(found, second)
    (third,) = started(found)
    assert kind(third) == ("b", "decode")  # the oldest request's model, alone on the chip
    finish(found, third)
    (fourth,) = started(found)
    assert kind(fourth) == ("b", "decode")


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "round_robin"])
def test_everything_ends(policy: str) -> None:
    found = unit(policy, num_pages=80)
    for number in range(12):
        found.add(request(number, "ab"[number % 2], prompt_tokens=5 + number, max_tokens=15))
    flying: list[Step] = []
    for turn in range(2000):
        flying += started(found, now=turn * 0.01)
        if not flying:
            break
        finish(found, flying.pop(turn % len(flying)), now=turn * 0.01)
    assert found.num_requests == 0
    assert sum(state.finished for state in found.models.values()) == 12


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="no policy 'none'; there are slo, adbs"):
        create_concurrent_policy("none", ComputeShares({}))
    with pytest.raises(ValueError, match="these have: slo, adbs, fcfs, round_robin, static"):
        create_concurrent_policy("mutex", ComputeShares({}))
