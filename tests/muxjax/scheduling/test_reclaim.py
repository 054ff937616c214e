"""Borrowed pages are reclaimed in time, and floors hold under any load of other models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.blocked_requests import RECLAIM_STEPS
from muxjax.scheduling.kv_cache.pool_division import OpenPool
from muxjax.scheduling.policies.registry import policy_names
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import Demand, ModelSpec
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, request, spec

MAX_STEPS = 20
"""Steps within which a model has its floor, or all its requests run."""
FAIR_POLICIES = [name for name in ("adbs", "round_robin", "slo") if name in policy_names()]
"""Policies that schedule every model within a few steps. `fcfs` has one queue for all models: a
late request waits for all earlier ones, whatever the floor of its model."""


def model(name: str, floor: float | None, length: int = 40, seqs: int = 32) -> ModelSpec:
    """Four tokens per page; a slab is a page."""
    return spec(
        name,
        1,
        4,
        length,
        kv_floor=floor,
        max_seqs=seqs,
        decode_tokens=4,
        prefill_tokens=64,
        prefill_seqs=8,
    )


def short_of(scheduler: Scheduler, name: str) -> bool:
    """Whether the model waits for pages within its floor, or waits and holds none."""
    state, allocator = scheduler.models[name], scheduler.allocator
    waiting = next(iter(state.waiting.values()), None)
    if waiting is None or not state.free_slots or not scheduler.is_settled(waiting):
        return False
    burst = state.spec.limits.max_decode_tokens
    blocks = state.spec.blocks_for(waiting.num_tokens + burst)
    blocks += state.spec.blocks_for(burst * len(state.running))
    leased = allocator.leased_slabs(name)
    return (
        not leased
        or leased + allocator.slabs_to_lease(name, blocks) <= scheduler.quotas.floors[name]
    )


def steps_until_served(loop: Loop, name: str) -> int:
    """Number of steps until the model is not `short_of` pages."""
    before = len(loop.steps)
    while short_of(loop.scheduler, name):
        assert loop.turn()
        assert len(loop.steps) - before <= 200
    return len(loop.steps) - before


def borrow_everything(policy: str, *specs: ModelSpec, slabs: int, output: int = 18) -> Loop:
    """A pool in which the first model borrows all it can and has many more requests waiting."""
    loop = Loop.create(specs, 1 + slabs, policy)
    loop.check = False
    for number in range(40):
        loop.scheduler.add(request(number, specs[0].name, 20, output))
    while loop.scheduler.quotas.leasable(specs[0].name) > 6:
        loop.turn()
    return loop


@pytest.mark.parametrize("policy", FAIR_POLICIES)
@pytest.mark.parametrize("prompts", [[5] * 12, [30] * 6, [39], [3, 38, 3, 38]])
def test_model_reaches_its_floor_or_runs_all_requests_within_twenty_steps(
    policy: str, prompts: list[int]
) -> None:
    loop = borrow_everything(policy, model("a", 0.1), model("b", 0.25), slabs=60)
    assert loop.scheduler.quotas.over_quota("a") > 0
    requests = [request(100 + i, "b", length, 40 - length) for i, length in enumerate(prompts)]
    for req in requests:
        loop.scheduler.add(req)
    assert steps_until_served(loop, "b") <= MAX_STEPS
    held = loop.scheduler.allocator.leased_slabs("b")
    state = loop.scheduler.models["b"]
    assert held >= loop.scheduler.quotas.floors["b"] - 10 or not state.waiting
    assert held > 0
    loop.check = True
    while not all(req.finished for req in requests):
        assert loop.turn()
    for req in requests:
        assert req.output == isolated_tokens(loop.scheduler, req)


@pytest.mark.parametrize("policy", FAIR_POLICIES)
def test_a_first_request_larger_than_the_quota_is_admitted(policy: str) -> None:
    demand = {"a": Demand(99.0, 1.0, 1.0), "b": Demand(0.0, 1.0, 1.0)}
    specs = [model("a", 0.0, 100), model("b", 0.1, 120)]
    loop = Loop.create(specs, 1 + 60, policy, demand=lambda models, _: demand)
    loop.check = False
    assert loop.scheduler.quotas.quotas == {"a": 54, "b": 6}
    for number in range(40):
        loop.scheduler.add(request(number, "a", 8, 80))
    for _ in range(20):
        loop.turn()
    large = request(100, "b", 100, 20)
    loop.scheduler.add(large)
    assert steps_until_served(loop, "b") <= MAX_STEPS
    reclaimed = loop.scheduler.quotas.reclaimed[-1]
    assert (reclaimed.donor, reclaimed.recipient, reclaimed.reason) == ("a", "b", "first request")
    while not large.finished:
        assert loop.turn()
    assert large.preemptions == 0
    assert large.output == isolated_tokens(loop.scheduler, large)
    loop.scheduler.check_invariants()


def test_pages_above_quota_are_reclaimed_after_some_steps_and_recorded() -> None:
    # The quota of b is half of the pool, its floor 0.
    specs = [model("a", 0.0, 100), model("b", 0.0)]
    loop = borrow_everything("round_robin", *specs, slabs=60, output=80)
    req = request(100, "b", 30, 10)
    loop.scheduler.add(req)
    loop.turn()
    before = len(loop.steps)
    while not loop.scheduler.allocator.leased_slabs("b"):
        assert loop.turn()
    assert RECLAIM_STEPS - 2 <= len(loop.steps) - before <= RECLAIM_STEPS + 4
    stats = loop.scheduler.stats()
    reclaim = stats["kv_reclaims"][-1]
    assert (reclaim["from"], reclaim["to"], reclaim["reason"]) == ("a", "b", "quota")
    assert reclaim["requests"] > 0
    assert reclaim["pages"] == stats["models"]["a"]["kv_pages_given_back"] > 0
    assert reclaim["pages"] == stats["models"]["b"]["kv_pages_taken_back"]
    assert 0 < stats["kv_fairness"] <= 1


def test_an_open_pool_reclaims_nothing() -> None:
    specs = [model("a", None), model("b", None)]
    loop = Loop.create(specs, 61, "round_robin", kv_quotas=OpenPool)
    loop.check = False
    for number in range(30):
        loop.scheduler.add(request(number, "a", 20, 18))
    for number in range(30, 34):
        loop.scheduler.add(request(number, "b", 30, 10))
    loop.run()
    assert not [
        reclaim for reclaim in loop.scheduler.quotas.reclaimed if reclaim.reason != "growth"
    ]


@pytest.mark.parametrize("policy", FAIR_POLICIES)
def test_backlog_of_one_model_does_not_block_the_floor_of_another(
    policy: str,
) -> None:
    loop = Loop.create([model("greedy", 0.1, 64), model("b", 0.25)], 1 + 80, policy)
    for number in range(1000):
        loop.scheduler.add(request(number, "greedy", 40, 24))
    loop.check = False
    for _ in range(30):
        loop.turn()
    waits = []
    for round_ in range(8):
        for number in range(3):
            loop.scheduler.add(request(2000 + 10 * round_ + number, "b", 9, 7))
        waits.append(steps_until_served(loop, "b"))
        while loop.scheduler.models["b"].has_prefill or loop.scheduler.models["b"].has_decode:
            assert loop.turn()
    assert max(waits) <= MAX_STEPS
    assert loop.scheduler.models["greedy"].waiting
    assert all(
        req.preemptions == 0
        for req in (update.request for update in loop.updates)
        if req.model == "b"
    )


# Random workloads


@st.composite
def floors(draw: st.DrawFn, count: int) -> list[float | None]:
    """Floors, some of them given, with a total of at most half the pool."""
    given = [draw(st.none() | st.floats(0, 1)) for _ in range(count)]
    total = sum(floor or 0 for floor in given) or 1
    return [None if floor is None else floor / total / 2 for floor in given]


@pytest.mark.parametrize("policy", policy_names())
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_floors_hold_and_quotas_fit_the_pool(policy: str, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 7), "models")
    given_floors = data.draw(floors(count), "floors")
    specs = [
        spec(
            f"m{i}",
            data.draw(st.integers(1, 4), "layers"),
            data.draw(st.sampled_from([2, 4, 7]), "tokens per page"),
            data.draw(st.integers(8, 48), "length"),
            max_seqs=data.draw(st.integers(1, 6), "slots"),
            decode_tokens=data.draw(st.sampled_from([1, 4]), "burst"),
            kv_floor=floor,
        )
        for i, floor in enumerate(given_floors)
    ]
    pages = data.draw(st.integers(20, 300), "pages")
    try:
        loop = Loop.create(specs, pages, policy)
    except PoolTooSmall:
        return
    scheduler, random = loop.scheduler, data.draw(st.randoms(use_true_random=False))
    number = 0
    alive: list[Request] = []
    loop.check = False
    for _ in range(30):
        loop.executor.now += random.choice([0.0, 0.1, 2.0])  # so that quotas move
        for _ in range(random.choice([0, 0, 1, 3])):
            model_spec = random.choice(specs)
            length = random.randint(1, model_spec.max_model_len - 1)
            alive.append(request(number, model_spec.name, length, random.randint(1, 40)))
            scheduler.add(alive[-1])
            number += 1
        if alive and random.random() < 0.1:
            scheduler.cancel(alive.pop(random.randrange(len(alive))).id)
        loop.turn()
        scheduler.quotas.check_invariants()  # they sum to the pool, each at least its floor
        leased = sum(scheduler.allocator.leased_slabs(model_spec.name) for model_spec in specs)
        assert leased <= scheduler.allocator.num_slabs
    scheduler.check_invariants()
    # A request within its model's floor is admitted at once, for each model.
    random.shuffle(specs)
    for model_spec in specs:
        state = scheduler.models[model_spec.name]
        if (
            short_of(scheduler, model_spec.name)
            and scheduler.allocator.leased_slabs(model_spec.name)
            and not (state.prefilling)
        ):
            assert scheduler.batch_builder.build_prefill(model_spec.name) is not None
            scheduler.check_invariants()
