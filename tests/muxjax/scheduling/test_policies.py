from __future__ import annotations

from collections.abc import Callable

import pytest

from muxjax.mock_executor import MockLatency
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.policies import POLICIES, PREFILL_OVERDRAFT, make_policy
from muxjax.scheduling.requests import RequestState
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.scheduling.steps import Decode, Prefill
from muxjax.scheduling.unit import Policy
from tests.muxjax.scheduling.harness import Loop, request, solo_tokens, spec


def shorthand(loop: Loop) -> str:
    """Steps as letters: the model's name, upper case for a prefill."""
    return "".join(
        step.model.upper() if isinstance(step, Prefill) else step.model for step in loop.steps
    )


def test_policies_have_the_names_of_the_fleet_file() -> None:
    assert list(POLICIES) == ["adbs", "fcfs", "round_robin"]
    for name in POLICIES:
        policy = make_policy(name)
        assert isinstance(policy, Policy)
        assert policy.name == name
    with pytest.raises(ValueError, match="no policy 'lifo'; there are adbs, fcfs, round_robin"):
        make_policy("lifo")


@pytest.mark.parametrize("policy", POLICIES)
def test_an_idle_unit_has_nothing_to_do(policy: str) -> None:
    loop = Loop.of([spec("a"), spec("b")], 200, policy)
    assert loop.unit.next_step(0.0) is None


def two_models(policy: str, tokens: int = 9) -> Loop:
    """Two models with two requests each, that arrive as a b a b."""
    specs = [spec("a", prefill_tokens=5, decode_tokens=4), spec("b", 3, decode_tokens=4)]
    loop = Loop.of(specs, 400, policy)
    for i in range(4):
        loop.unit.add(request(i, "ab"[i % 2], prompt_tokens=5, max_tokens=tokens))
    loop.run()
    return loop


def test_fcfs_prefills_in_order_of_arrival_and_decodes_the_oldest_model_first() -> None:
    # Both of b's prompts go with the first, as they fit in one step; a's do not.
    # When all tokens of a are in flight, b has its turn.
    assert shorthand(two_models("fcfs")) == "ABAaabb"


def test_round_robin_takes_turns() -> None:
    assert shorthand(two_models("round_robin")) == "ABAbaba"


def test_fcfs_does_not_overtake_the_first_in_line() -> None:
    loop = Loop.of([spec("a", max_seqs=1), spec("b")], 200, "fcfs")
    requests = [request(i, model, max_tokens=9) for i, model in enumerate("aab")]
    for one in requests:
        loop.unit.add(one)
    loop.turn()
    loop.turn()
    assert requests[2].state is RequestState.WAITING
    loop.run()
    assert shorthand(loop).index("B") > shorthand(loop).index("A", 1)
    loop.assert_empty()


def test_adbs_prefills_first() -> None:
    loop = two_models("adbs")
    assert shorthand(loop)[:3] == "ABA"
    assert shorthand(loop)[3:].islower()


def decode_needs(**seconds: float) -> Callable[[ModelSpec, StepEstimates], Demand]:
    """Expected needs of decode time by model, and none of prefill."""
    return lambda model, _: Demand(1.0, 0.0, seconds[model.name])


def test_adbs_gives_decodes_their_share_when_prefills_flood() -> None:
    # Without shares, the prefills would go on until all 200 prompts are in.
    specs = [
        spec("a", 1, 16, 2048, max_seqs=256, prefill_tokens=512),
        spec("b", 1, 16, 512, decode_tokens=4),
    ]
    loop = Loop.of(specs, 30_000)
    loop.executor.latency = MockLatency(prefill=0.1, prefill_token=0.0, decode=0.02)
    loop.unit.add(request(0, "b", max_tokens=400))
    loop.turn()
    for i in range(200):
        loop.unit.add(request(1 + i, "a", prompt_tokens=500, max_tokens=1))
    for _ in range(150):
        loop.turn()
    used, shares = loop.unit.time.used, loop.unit.time.shares
    assert shares["a", "prefill"] == shares["b", "decode"]
    assert used["b", "decode"] > 3
    # Prefills are ahead of the mean of both by the overdraft, decodes behind it by as much.
    ahead = used["a", "prefill"] - used["b", "decode"]
    assert ahead == pytest.approx(2 * PREFILL_OVERDRAFT, abs=0.2)


def test_adbs_shares_decode_time_as_needed() -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=4) for name in "ab"]
    loop = Loop.of(specs, 4000, demand=decode_needs(a=3.0, b=1.0))
    for i, name in enumerate("ab"):
        loop.unit.add(request(i, name, max_tokens=4000))
    for _ in range(300):
        loop.turn()
    used, shares = loop.unit.time.used, loop.unit.time.shares
    wanted = shares["a", "decode"] / shares["b", "decode"]
    assert used["a", "decode"] / used["b", "decode"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("need", "bursts"),
    [
        (1.0, {"a": {9}, "b": {9}}),  # 0.1 s at 10.01 ms a token
        (30.0, {"a": {9}, "b": {1}}),  # at least 20 ms, even for the one with the small share
    ],
)
def test_adbs_bursts_fit_their_time(need: float, bursts: dict[str, set[int]]) -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=64) for name in "ab"]
    loop = Loop.of(specs, 4000, demand=decode_needs(a=need, b=1.0))
    loop.executor.latency = MockLatency(decode=0.01)
    for i, name in enumerate("ab"):
        loop.unit.add(request(i, name, max_tokens=1000))
    for _ in range(60):
        loop.turn()
    late = [step for step in loop.steps[20:] if isinstance(step, Decode)]
    seen = {name: {step.num_tokens for step in late if step.model == name} for name in "ab"}
    assert seen == bursts


@pytest.mark.parametrize("policy", ["adbs", "round_robin"])
def test_a_greedy_neighbour_does_not_keep_others_waiting(policy: str) -> None:
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
            assert turns <= 12
        while not modest.finished:
            loop.turn()
            turns += 1
            assert turns <= 40
        assert modest.output == solo_tokens(loop.unit, modest)
    assert loop.unit.models["greedy"].waiting
