from __future__ import annotations

import pytest

from muxjax.scheduling.requests import RequestState
from muxjax.scheduling.specs import Demand
from tests.muxjax.scheduling.harness import Loop, request, shorthand, spec, two_models


def test_fcfs_prefills_in_order_of_arrival_and_decodes_the_oldest_model_first() -> None:
    # Both of b's prompts go with the first, as they fit in one step; a's do not.
    # When all tokens of a are in flight, b decodes.
    assert shorthand(two_models("fcfs")) == "ABAaabb"


def test_round_robin_takes_turns() -> None:
    assert shorthand(two_models("round_robin")) == "ABAbaba"


def test_fcfs_does_not_overtake_the_head_of_the_queue() -> None:
    loop = Loop.create([spec("a", max_seqs=1), spec("b")], 200, "fcfs")
    requests = [request(i, model, max_tokens=9) for i, model in enumerate("aab")]
    for req in requests:
        loop.scheduler.add(req)
    loop.turn()
    loop.turn()
    assert requests[2].state is RequestState.WAITING
    loop.run()
    assert shorthand(loop).index("B") > shorthand(loop).index("A", 1)
    loop.assert_empty()


def test_temporal_runs_the_same_steps_as_fcfs() -> None:
    assert shorthand(two_models("temporal")) == shorthand(two_models("fcfs"))


def test_static_uses_fixed_shares_of_time() -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=4) for name in "ab"]
    needs = {"a": Demand(1.0, 1.0, 5.0), "b": Demand(1.0, 1.0, 1.0)}
    loop = Loop.create(specs, 4000, "static", demand=lambda models, _: needs)
    for i, name in enumerate("ab"):
        loop.scheduler.add(request(i, name, max_tokens=4000))
    for _ in range(400):
        loop.turn()
    used, shares = loop.scheduler.fair_share.used, loop.scheduler.fair_share.shares
    expected = sum(shares["a", phase] for phase in ("prefill", "decode"))
    time = {name: used[name, "prefill"] + used[name, "decode"] for name in "ab"}
    assert time["a"] / (time["a"] + time["b"]) == pytest.approx(expected, rel=0.05)


def test_mutex_order_is_deterministic() -> None:
    steps = shorthand(two_models("mutex", tokens=40))
    assert steps == shorthand(two_models("mutex", tokens=40))
    assert "aa" in steps.lower() or "bb" in steps.lower()


def test_static_order_does_not_depend_on_hashing() -> None:
    # Models with equal virtual time run in the order of the unit, not in that of a set of names.
    specs = [spec(name) for name in "hgfedcba"]
    loop = Loop.create(specs, 2000, "static")
    for number, model in enumerate(specs):
        loop.scheduler.add(request(number, model.name))
    for _ in range(8):
        loop.turn()
    assert shorthand(loop) == "HGFEDCBA"
