"""Models are added to a unit and removed from it while others are served."""

from __future__ import annotations

import dataclasses
import random

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.timeline import Timeline
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec

A, B, C = spec("a", 2, 4), spec("b", 3, 6), spec("c", 1, 8)
PAGES = 150


def loop_with(*absent: str, policy: str = "adbs") -> Loop:
    """A loop with a pool for all three models, without the absent ones."""
    loop = Loop.create([A, B, C], PAGES, policy)
    for name in absent:
        loop.scheduler.remove_model(name)
    return loop


def test_quota_and_share_of_a_removed_model_go_to_the_others() -> None:
    scheduler = loop_with().scheduler
    slabs = scheduler.allocator.num_slabs
    before = dict(scheduler.quotas.quotas)
    scheduler.remove_model("b")
    assert set(scheduler.quotas.quotas) == {"a", "c"}
    assert sum(scheduler.quotas.quotas.values()) == slabs
    assert all(scheduler.quotas.quotas[name] >= before[name] for name in "ac")
    assert sum(scheduler.fair_share.shares.values()) == pytest.approx(1.0)
    scheduler.add_model(B)
    assert scheduler.quotas.quotas == before
    scheduler.check_invariants()


def test_all_models_can_be_removed() -> None:
    loop = loop_with("a", "b", "c")
    assert loop.scheduler.next_step(10.0) is None
    assert loop.scheduler.stats()["models"] == {}
    loop.scheduler.check_invariants()
    loop.scheduler.add_model(C)
    loop.scheduler.add(request(1, "c"))
    loop.run()
    assert loop.updates[-1].finish_reason == "length"


@pytest.mark.parametrize("policy", policy_names())
def test_models_are_added_and_removed_under_load(policy: str) -> None:
    loop, specs = Loop.create([A, B, C], PAGES, policy, prefix_cache=True), {"a": A, "b": B, "c": C}
    rng, requests = random.Random(policy), []
    for turn in range(300):
        name = rng.choice("abc")
        if name in loop.scheduler.models and rng.random() < 0.4:
            # Few different prompts, so that cached prefixes are reused.
            requests.append(request(turn % 7, name, 3 + turn % 20, 1 + turn % 9))
            requests[-1].id = turn
            loop.scheduler.add(requests[-1])
        elif name not in loop.scheduler.models:
            loop.scheduler.add_model(specs[name])
        elif loop.scheduler.is_idle(name) and rng.random() < 0.5:
            loop.scheduler.remove_model(name)
        loop.turn()
    loop.run()
    full = loop_with().scheduler
    assert len(requests) > 50
    for req in requests:
        assert req.output == isolated_tokens(full, req)


def test_removed_model_loses_its_cached_prefixes() -> None:
    loop = Loop.create([A, B], PAGES, prefix_cache=True)
    prompts = [request(number, "a", 20, 4) for number in (0, 1)]
    prompts[1].prompt = list(prompts[0].prompt)
    loop.scheduler.add(prompts[0])
    loop.run()
    assert loop.scheduler.stats()["models"]["a"]["kv_pages_cached"] > 0
    loop.scheduler.remove_model("a")
    loop.scheduler.add_model(A)
    assert loop.scheduler.allocator.empty_slabs == loop.scheduler.allocator.num_slabs
    loop.scheduler.add(prompts[1])
    loop.run()
    assert prompts[1].cached_tokens == 0
    assert prompts[1].output == prompts[0].output


def test_busy_model_cannot_be_removed() -> None:
    loop = loop_with()
    loop.scheduler.add(request(1, "a", 5, 3))
    with pytest.raises(ValueError, match="a has requests"):
        loop.scheduler.remove_model("a")
    loop.turn()
    loop.scheduler.cancel(1)
    assert not loop.scheduler.is_idle("a")  # its step is in flight
    loop.run()
    loop.scheduler.remove_model("a")


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    scheduler = loop_with().scheduler
    before = scheduler.stats()
    deep = spec("deep", 64, 4)
    with pytest.raises(ValueError, match=r"a block of deep has 64 pages.*at most 3"):
        scheduler.add_model(deep)
    greedy = spec("greedy", 1, 4, kv_floor=1.0)
    with pytest.raises(PoolTooSmall, match="pool too small"):
        scheduler.add_model(greedy)
    with pytest.raises(ValueError, match="a is in the pool already"):
        scheduler.add_model(A)
    assert scheduler.stats() == before
    scheduler.check_invariants()


def test_models_are_updated_while_requests_run() -> None:
    loop = loop_with()
    for number in range(6):
        loop.scheduler.add(request(number, "ab"[number % 2], 9, 8))
    loop.turn()
    before = dict(loop.scheduler.quotas.floors)
    loop.scheduler.update_models([dataclasses.replace(A, kv_floor=0.5)])
    assert loop.scheduler.quotas.floors["a"] > before["a"]
    with pytest.raises(PoolTooSmall):
        loop.scheduler.update_models([dataclasses.replace(B, kv_floor=0.9)])
    assert loop.scheduler.models["b"].spec == B
    loop.run()
    loop.assert_empty()


def test_timeline_includes_models_added_later() -> None:
    scheduler = Scheduler([A, B], PAGES, create_policy("adbs"))
    scheduler.remove_model("b")
    loop, timeline = Loop(scheduler, MockExecutor([A, B], PAGES)), Timeline()
    for name in "ab":
        if name == "b":
            scheduler.add_model(B)
        scheduler.add(request(ord(name), name))
        step = scheduler.next_step(0.0)
        assert step is not None
        result = loop.executor.result(loop.executor.submit(step))
        scheduler.apply(step, result, 0.0)
        timeline.record(scheduler, step, result)
    events = list(timeline.events())
    assert {event["name"] for event in events if event["ph"] == "X"} == {"a prefill", "b prefill"}
    assert {"a", "b"} in [set(event["args"]) for event in events if event["ph"] == "C"]
