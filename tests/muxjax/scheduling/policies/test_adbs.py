from __future__ import annotations

import pytest

from muxjax.scheduling.demand import DemandFunction
from muxjax.scheduling.policies.adbs import PREFILL_OVERDRAFT
from muxjax.scheduling.specs import Demand
from muxjax.scheduling.steps import Decode, Prefill
from muxjax.testing.mock_executor import MockLatency
from tests.muxjax.scheduling.harness import Loop, request, shorthand, spec, two_models


def test_adbs_prefills_first() -> None:
    loop = two_models("adbs")
    assert shorthand(loop)[:3] == "ABA"
    assert shorthand(loop)[3:].islower()


def decode_needs(**seconds: float) -> DemandFunction:
    """Expected demand for decode time by model, and none for prefill."""
    return lambda models, _: {name: Demand(1.0, 0.0, need) for name, need in seconds.items()}


def test_adbs_keeps_the_share_of_decodes_during_a_flood_of_prefills() -> None:
    # Without shares, prefills would run until all 200 prompts are done.
    specs = [
        spec("a", 1, 16, 2048, max_seqs=256, prefill_tokens=512),
        spec("b", 1, 16, 512, decode_tokens=4),
    ]
    loop = Loop.create(specs, 30_000)
    loop.executor.latency = MockLatency(prefill=0.1, prefill_token=0.0, decode=0.02)
    loop.scheduler.add(request(0, "b", max_tokens=400))
    loop.turn()
    for i in range(200):
        loop.scheduler.add(request(1 + i, "a", prompt_tokens=500, max_tokens=1))
    for _ in range(150):
        loop.turn()
    used, shares = loop.scheduler.fair_share.used, loop.scheduler.fair_share.shares
    assert shares["a", "prefill"] == shares["b", "decode"]
    assert used["b", "decode"] > 3
    # Prefills are ahead of the mean of both by the overdraft, decodes behind it by as much.
    ahead = used["a", "prefill"] - used["b", "decode"]
    assert ahead == pytest.approx(2 * PREFILL_OVERDRAFT, abs=0.2)


def test_adbs_chunks_prefills_that_have_used_up_their_share() -> None:
    specs = [
        spec("a", 1, 16, 2048, max_seqs=256, prefill_tokens=512),
        spec("b", 1, 16, 2048, decode_tokens=4),
    ]
    loop = Loop.create(specs, 30_000)
    loop.check = False
    loop.executor.latency = MockLatency(prefill=0.005, prefill_token=0.001, decode=0.02)
    loop.scheduler.add(request(0, "b", max_tokens=1000))
    loop.turn()
    for i in range(40):
        loop.scheduler.add(request(1 + i, "a", prompt_tokens=510, max_tokens=1))
    for _ in range(120):
        loop.turn()
    sizes = [s.num_tokens for s in loop.steps if isinstance(s, Prefill) and s.model == "a"]
    assert max(sizes[:3]) > 500  # no chunks while some overdraft is left
    assert max(sizes[12:]) == 128


def test_adbs_shares_decode_time_as_needed() -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=4) for name in "ab"]
    loop = Loop.create(specs, 4000, demand=decode_needs(a=3.0, b=1.0))
    for i, name in enumerate("ab"):
        loop.scheduler.add(request(i, name, max_tokens=4000))
    for _ in range(300):
        loop.turn()
    used, shares = loop.scheduler.fair_share.used, loop.scheduler.fair_share.shares
    expected = shares["a", "decode"] / shares["b", "decode"]
    assert used["a", "decode"] / used["b", "decode"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("need", "bursts"),
    [
        (1.0, {"a": {9}, "b": {9}}),  # 0.1 s at 10.01 ms a token
        (30.0, {"a": {9}, "b": {1}}),  # at least 20 ms, even for the model with the small share
    ],
)
def test_adbs_bursts_fit_their_time(need: float, bursts: dict[str, set[int]]) -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=64) for name in "ab"]
    loop = Loop.create(specs, 4000, demand=decode_needs(a=need, b=1.0))
    loop.executor.latency = MockLatency(decode=0.01)
    for i, name in enumerate("ab"):
        loop.scheduler.add(request(i, name, max_tokens=1000))
    for _ in range(60):
        loop.turn()
    late = [step for step in loop.steps[20:] if isinstance(step, Decode)]
    seen = {name: {step.num_tokens for step in late if step.model == name} for name in "ab"}
    assert seen == bursts
