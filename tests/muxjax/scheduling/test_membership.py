"""Models that come to a unit and leave it while others are served."""

from __future__ import annotations

import dataclasses
import random

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.timeline import Timeline
from muxjax.testing.mock_executor import MockExecutor
from tests.muxjax.scheduling.harness import Loop, request, solo_tokens, spec

A, B, C = spec("a", 2, 4), spec("b", 3, 6), spec("c", 1, 8)
PAGES = 150


def loop_with(*absent: str, policy: str = "adbs") -> Loop:
    """A loop whose unit was cut for all three models and has those that are not absent."""
    loop = Loop.of([A, B, C], PAGES, policy)
    for name in absent:
        loop.unit.remove_model(name)
    return loop


def test_the_part_of_who_leaves_goes_to_the_others() -> None:
    unit = loop_with().unit
    slabs = unit.allocator.num_slabs
    before = dict(unit.quotas.quotas)
    unit.remove_model("b")
    assert set(unit.quotas.quotas) == {"a", "c"}
    assert sum(unit.quotas.quotas.values()) == slabs
    assert all(unit.quotas.quotas[name] >= before[name] for name in "ac")
    assert sum(unit.fair_share.shares.values()) == pytest.approx(1.0)
    unit.add_model(B)
    assert unit.quotas.quotas == before
    unit.check_invariants()


def test_a_unit_may_be_left_without_models() -> None:
    loop = loop_with("a", "b", "c")
    assert loop.unit.next_step(10.0) is None
    assert loop.unit.stats()["models"] == {}
    loop.unit.check_invariants()
    loop.unit.add_model(C)
    loop.unit.add(request(1, "c"))
    loop.run()
    assert loop.updates[-1].finish_reason == "length"


@pytest.mark.parametrize("policy", policy_names())
def test_models_come_and_go_under_load(policy: str) -> None:
    loop, specs = Loop.of([A, B, C], PAGES, policy, prefix_cache=True), {"a": A, "b": B, "c": C}
    chance, asked = random.Random(policy), []
    for turn in range(300):
        name = chance.choice("abc")
        if name in loop.unit.models and chance.random() < 0.4:
            # Few prompts, so that prefixes are found again.
            asked.append(request(turn % 7, name, 3 + turn % 20, 1 + turn % 9))
            asked[-1].id = turn
            loop.unit.add(asked[-1])
        elif name not in loop.unit.models:
            loop.unit.add_model(specs[name])
        elif loop.unit.is_idle(name) and chance.random() < 0.5:
            loop.unit.remove_model(name)
        loop.turn()
    loop.run()
    full = loop_with().unit
    assert len(asked) > 50
    for one in asked:
        assert one.output == solo_tokens(full, one)


def test_who_leaves_keeps_no_prefix() -> None:
    loop = Loop.of([A, B], PAGES, prefix_cache=True)
    prompts = [request(number, "a", 20, 4) for number in (0, 1)]
    prompts[1].prompt = list(prompts[0].prompt)
    loop.unit.add(prompts[0])
    loop.run()
    assert loop.unit.stats()["models"]["a"]["kv_pages_cached"] > 0
    loop.unit.remove_model("a")
    loop.unit.add_model(A)
    assert loop.unit.allocator.empty_slabs == loop.unit.allocator.num_slabs
    loop.unit.add(prompts[1])
    loop.run()
    assert prompts[1].cached_tokens == 0
    assert prompts[1].output == prompts[0].output


def test_who_works_cannot_leave() -> None:
    loop = loop_with()
    loop.unit.add(request(1, "a", 5, 3))
    with pytest.raises(ValueError, match="a has requests"):
        loop.unit.remove_model("a")
    loop.turn()
    loop.unit.cancel(1)
    assert not loop.unit.is_idle("a")  # its step is in flight
    loop.run()
    loop.unit.remove_model("a")


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    unit = loop_with().unit
    before = unit.stats()
    deep = spec("deep", 64, 4)
    with pytest.raises(ValueError, match=r"a block of deep has 64 pages.*at most 3"):
        unit.add_model(deep)
    greedy = spec("greedy", 1, 4, kv_floor=1.0)
    with pytest.raises(PoolTooSmall, match="pool too small"):
        unit.add_model(greedy)
    with pytest.raises(ValueError, match="a is in the pool already"):
        unit.add_model(A)
    assert unit.stats() == before
    unit.check_invariants()


def test_expectations_change_while_requests_run() -> None:
    loop = loop_with()
    for number in range(6):
        loop.unit.add(request(number, "ab"[number % 2], 9, 8))
    loop.turn()
    before = dict(loop.unit.quotas.floors)
    loop.unit.update_models([dataclasses.replace(A, kv_floor=0.5)])
    assert loop.unit.quotas.floors["a"] > before["a"]
    with pytest.raises(PoolTooSmall):
        loop.unit.update_models([dataclasses.replace(B, kv_floor=0.9)])
    assert loop.unit.models["b"].spec == B
    loop.run()
    loop.assert_empty()


def test_a_timeline_knows_all_that_were_there() -> None:
    unit = Scheduler([A, B], PAGES, create_policy("adbs"))
    unit.remove_model("b")
    loop, timeline = Loop(unit, MockExecutor([A, B], PAGES)), Timeline()
    for name in "ab":
        if name == "b":
            unit.add_model(B)
        unit.add(request(ord(name), name))
        step = unit.next_step(0.0)
        assert step is not None
        result = loop.executor.result(loop.executor.submit(step))
        unit.apply(step, result, 0.0)
        timeline.record(unit, step, result)
    events = list(timeline.events())
    assert {event["name"] for event in events if event["ph"] == "X"} == {"a prefill", "b prefill"}
    assert {"a", "b"} in [set(event["args"]) for event in events if event["ph"] == "C"]
