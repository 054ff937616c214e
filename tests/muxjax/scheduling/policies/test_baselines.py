from __future__ import annotations

import pytest

from muxjax.scheduling.requests import RequestState
from muxjax.scheduling.specs import Demand
from tests.muxjax.scheduling.harness import Loop, request, shorthand, spec, two_models


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


def test_temporal_makes_the_steps_of_fcfs() -> None:
    assert shorthand(two_models("temporal")) == shorthand(two_models("fcfs"))


def test_static_gives_models_time_in_proportion_to_shares_that_stay() -> None:
    specs = [spec(name, 1, 16, 4096, decode_tokens=4) for name in "ab"]
    needs = {"a": Demand(1.0, 1.0, 5.0), "b": Demand(1.0, 1.0, 1.0)}
    loop = Loop.of(specs, 4000, "static", demand=lambda model, _: needs[model.name])
    for i, name in enumerate("ab"):
        loop.unit.add(request(i, name, max_tokens=4000))
    for _ in range(400):
        loop.turn()
    used, shares = loop.unit.fair_share.used, loop.unit.fair_share.shares
    wanted = sum(shares["a", phase] for phase in ("prefill", "decode"))
    time = {name: used[name, "prefill"] + used[name, "decode"] for name in "ab"}
    assert time["a"] / (time["a"] + time["b"]) == pytest.approx(wanted, rel=0.05)


def test_mutex_draws_lots_the_same_way_each_time() -> None:
    steps = shorthand(two_models("mutex", tokens=40))
    assert steps == shorthand(two_models("mutex", tokens=40))
    assert "aa" in steps.lower() or "bb" in steps.lower()


def test_static_is_the_same_in_every_process() -> None:
    # Models that are as far as each other go in the unit's order, not in that of a set of names.
    specs = [spec(name) for name in "hgfedcba"]
    loop = Loop.of(specs, 2000, "static")
    for number, one in enumerate(specs):
        loop.unit.add(request(number, one.name))
    for _ in range(8):
        loop.turn()
    assert shorthand(loop) == "HGFEDCBA"
