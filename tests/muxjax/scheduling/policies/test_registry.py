from __future__ import annotations

import pytest

from muxjax.scheduling.policies.registry import create_policy, policy_names
from muxjax.scheduling.scheduler import Policy, Scheduler
from muxjax.testing.mock_executor import MockExecutor, MockLatency
from tests.muxjax.scheduling.harness import Loop, request, solo_tokens, spec


def test_policies_have_the_names_of_the_fleet_file() -> None:
    names = ("slo", "adbs", "fcfs", "round_robin", "static", "temporal", "mutex")
    assert policy_names() == names
    for name in policy_names():
        policy = create_policy(name)
        assert isinstance(policy, Policy)
        assert policy.name == name
    with pytest.raises(ValueError, match="no policy 'lifo'; there are slo, adbs, fcfs"):
        create_policy("lifo")
    with pytest.raises(ValueError, match="spatial gives each model devices of its own"):
        create_policy("spatial")


@pytest.mark.parametrize("policy", policy_names())
def test_an_idle_unit_has_nothing_to_do(policy: str) -> None:
    loop = Loop.of([spec("a"), spec("b")], 200, policy)
    assert loop.unit.next_step(0.0) is None


@pytest.mark.parametrize(
    ("policy", "most"),
    # `static` keeps to its shares of the time, however long the neighbour's steps are.
    [("slo", 12), ("adbs", 12), ("round_robin", 12), ("static", 40), ("mutex", 12)],
)
def test_a_greedy_neighbour_does_not_keep_others_waiting(policy: str, most: int) -> None:
    specs = [
        spec("greedy", 2, 4, 64, max_seqs=8, decode_tokens=4),
        spec("modest", 3, 4, 64, max_seqs=8, decode_tokens=4),
    ]
    loop = Loop.of(specs, 3 + 8 * 32, policy)
    for i in range(100):
        loop.unit.add(request(i, "greedy", prompt_tokens=30, max_tokens=30))
    for _ in range(50):
        loop.turn()
    for i in range(10):
        modest = request(1000 + i, "modest", prompt_tokens=30, max_tokens=9)
        loop.unit.add(modest)
        turns = 0
        while not modest.output:
            loop.turn()
            turns += 1
            assert turns <= most
        while not modest.finished:
            loop.turn()
            turns += 1
            assert turns <= most + 30
        assert modest.output == solo_tokens(loop.unit, modest)
    assert loop.unit.models["greedy"].waiting


@pytest.mark.parametrize("policy", policy_names())
def test_steps_that_take_no_time_are_no_trouble(policy: str) -> None:
    specs = [spec("a"), spec("b", 3)]
    still = MockLatency(prefill=0.0, prefill_token=0.0, decode=0.0, decode_sequence=0.0)
    unit = Scheduler(specs, 200, create_policy(policy), record_freed=True)
    loop = Loop(unit, MockExecutor(specs, 200, latency=still))
    for i in range(8):
        unit.add(request(i, "ab"[i % 2], max_tokens=20))
    loop.run()
    loop.assert_empty()
