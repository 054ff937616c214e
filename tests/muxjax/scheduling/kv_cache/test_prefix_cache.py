"""The prefix cache: lookup, retention and eviction, on the mock executor."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxjax.sampling_params import SamplingParams
from muxjax.scheduling.kv_cache.prefix_cache import choose_evictions
from muxjax.scheduling.model_state import ModelState
from muxjax.scheduling.policies.registry import create_policy
from muxjax.scheduling.requests import Request
from muxjax.scheduling.scheduler import Scheduler
from muxjax.scheduling.specs import ModelSpec
from muxjax.scheduling.steps import Prefill
from tests.muxjax.scheduling.harness import Loop, isolated_tokens, spec

SYSTEM = [(7 * i * i + 5) % 1009 for i in range(16)]
"""Four blocks of four tokens."""


def cached(specs: list[ModelSpec], pages: int = 400, policy: str = "adbs") -> Loop:
    return Loop.create(specs, pages, policy, prefix_cache=True)


class Client:
    """Runs requests one after another and compares each output with the isolated output."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.count = 0

    def add(
        self, prompt: list[int], model: str = "a", tokens: int = 6, **params: object
    ) -> Request:
        settings = SamplingParams(max_tokens=tokens, temperature=0.0, **params)
        request = Request(self.count, model, prompt, settings)
        self.count += 1
        self.loop.scheduler.add(request)
        return request

    def complete(
        self, prompt: list[int], model: str = "a", tokens: int = 6, **params: object
    ) -> Request:
        request = self.add(prompt, model, tokens, **params)
        self.loop.run()
        self.loop.assert_empty()
        assert request.output == isolated_tokens(self.loop.scheduler, request)
        return request


@pytest.fixture
def client() -> Client:
    return Client(cached([spec("a"), spec("b", 3)]))


def prefilled(loop: Loop, request: Request) -> int:
    """Tokens of a request that were computed by prefills."""
    return sum(
        len(chunk.tokens)
        for step in loop.steps
        if isinstance(step, Prefill)
        for chunk in step.chunks
        if chunk.request_id == request.id
    )


def stats(loop: Loop, model: str = "a") -> dict[str, int]:
    return loop.scheduler.stats()["models"][model]


def test_a_cached_prefix_is_not_computed(client: Client) -> None:
    first = client.complete([*SYSTEM, 1])
    second = client.complete([*SYSTEM, 2, 3])
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    assert prefilled(client.loop, first) == 17
    assert prefilled(client.loop, second) == 2
    assert stats(client.loop)["prefix_queries"] == 35
    assert stats(client.loop)["prefix_hits"] == 16


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 4), (15, 12), (16, 12)])
def test_the_last_token_is_always_computed(client: Client, length: int, found: int) -> None:
    client.complete(SYSTEM)
    request = client.complete(SYSTEM[:length])
    assert request.cached_tokens == found
    assert prefilled(client.loop, request) == length - found


def test_next_turn_reuses_the_previous_answer(client: Client) -> None:
    first = client.complete(SYSTEM, tokens=9)
    # The last of 25 tokens was never written: six blocks.
    second = client.complete([*SYSTEM, *first.output, 5])
    assert second.cached_tokens == 24


def test_prefix_is_not_shared_across_models_prompts_or_salts(client: Client) -> None:
    client.complete([*SYSTEM, 1])
    assert client.complete([*SYSTEM, 2], "b").cached_tokens == 0
    assert client.complete([SYSTEM[0] + 1, *SYSTEM[1:], 2]).cached_tokens == 0
    assert client.complete([*SYSTEM[:8], 0, *SYSTEM[9:], 2]).cached_tokens == 8
    assert client.complete([*SYSTEM, 2], cache_salt="mine").cached_tokens == 0
    assert client.complete([*SYSTEM, 3], cache_salt="mine").cached_tokens == 16
    assert client.complete([*SYSTEM, 3], cache_salt="other").cached_tokens == 0


def test_requests_that_need_all_positions_find_nothing_and_are_cached(client: Client) -> None:
    client.complete([*SYSTEM, 1])
    for params in ({"prompt_logprobs": 1}, {"repetition_penalty": 1.5}):
        request = client.complete([*SYSTEM, 2], **params)
        assert request.cached_tokens == 0
        assert prefilled(client.loop, request) == 17
    assert client.complete([*SYSTEM, 2], presence_penalty=0.5).cached_tokens == 16
    fresh = [token + 1 for token in SYSTEM]
    client.complete(fresh, repetition_penalty=1.5)
    assert client.complete([*fresh, 2]).cached_tokens == 16
    assert stats(client.loop)["prefix_queries"] == 17 + 17 + 17


@pytest.mark.parametrize(("penalty", "found"), [(0.5, 16), (0.0, 24)])
def test_penalty_limits_reuse_to_the_prompt(client: Client, penalty: float, found: int) -> None:
    first = client.complete(SYSTEM, tokens=12, presence_penalty=penalty)
    # Continues on another unit after 9 tokens, as the router resubmits it.
    params = dataclasses.replace(first.params, max_tokens=20)
    resumed = Request(99, "a", SYSTEM, params, output=first.output[:9])
    client.loop.scheduler.add(resumed)
    client.loop.run()
    assert resumed.found_tokens == found
    assert resumed.output == isolated_tokens(client.loop.scheduler, resumed)


def test_running_requests_share_blocks(client: Client) -> None:
    loop = client.loop
    first = client.add([*SYSTEM, 1], tokens=30)
    for _ in range(4):
        loop.turn()
    used_before = stats(loop)["kv_pages_used"]
    others = [client.add([*SYSTEM, n], tokens=4) for n in (2, 3)]
    loop.turn()
    loop.turn()
    assert [other.cached_tokens for other in others] == [16, 16]
    assert stats(loop)["kv_pages_used"] < used_before + 2 * 2 * 4
    assert others[0].blocks[:4] == others[1].blocks[:4] == first.blocks[:4]
    loop.scheduler.cancel(first.id)
    loop.run()
    loop.assert_empty()
    for other in others:
        assert other.output == isolated_tokens(loop.scheduler, other)


def test_a_request_in_the_same_step_finds_nothing_yet(client: Client) -> None:
    first, second = client.add(SYSTEM[:8]), client.add(SYSTEM[:8])
    client.loop.run()
    client.loop.assert_empty()
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert first.output == second.output
    assert client.complete(SYSTEM[:9]).cached_tokens == 8


def test_cancelled_request_leaves_its_written_blocks_cached() -> None:
    client = Client(cached([spec("a", prefill_tokens=6)]))
    request = client.add([*SYSTEM, 1])
    for _ in range(2):  # 12 tokens of 17
        client.loop.turn()
    assert request.dispatched == 12
    client.loop.scheduler.cancel(request.id)
    client.loop.run()
    assert client.complete([*SYSTEM, 1]).cached_tokens == 12


def test_a_preempted_request_finds_its_own_blocks() -> None:
    specs = [spec("a", 1, 4, 64, max_seqs=2, kv_floor=0.0), spec("b", 1, 4, 64, kv_floor=0.6)]
    client = Client(cached(specs, 1 + 40))
    loop = client.loop
    client.add(SYSTEM[:8], tokens=40)
    victim = client.add([*SYSTEM, 1], tokens=40)
    while victim.preemptions == 0:
        if loop.scheduler.num_requests < 4:
            client.add([token + client.count for token in SYSTEM], "b", tokens=30)
        assert loop.turn()
    loop.run()
    loop.assert_empty()
    assert victim.output == isolated_tokens(loop.scheduler, victim)
    assert victim.cached_tokens == 0  # blocks of other requests only
    assert prefilled(loop, victim) < 2 * len(victim.prompt)


def test_free_pages_are_allocated_before_cached_ones() -> None:
    # Two blocks of b in a slab, and one of a.
    client = Client(cached([spec("a", 2, 4, 32), spec("b", 1, 4, 32)], 2 + 2 * 64))
    scheduler = client.loop.scheduler
    for n in range(12):
        client.complete([n, *SYSTEM], "b" if n % 2 else "a")
    assert scheduler.allocator.empty_slabs > 0
    for n in range(12):
        assert client.complete([n, *SYSTEM], "b" if n % 2 else "a").cached_tokens == 16
    unit_stats = scheduler.stats()
    unused = unit_stats["free_pages"] + unit_stats["cached_pages"]
    assert unused == unit_stats["usable_pages"]
    assert unit_stats["models"]["a"]["kv_pages_used"] == 0
    # Prompt and answer are 23 tokens; the last is not written: five full blocks.
    assert unit_stats["models"]["a"]["kv_pages_cached"] == 2 * 6 * 5
    assert unit_stats["models"]["b"]["kv_pages_cached"] == 6 * 5


def test_eviction_starts_with_the_oldest_prefix_from_its_end() -> None:
    client = Client(cached([spec("a", 1, 4, 24, max_seqs=1)], 1 + 13))
    old, new = SYSTEM[:12], [token + 1 for token in SYSTEM[:12]]
    client.complete([*old, 1], tokens=1)
    client.complete([*new, 1], tokens=1)
    client.complete([*old, 2], tokens=1)  # used again, so that `new` is older
    client.complete([0] * 17, tokens=7)  # six of the seven empty blocks; five stay cached
    client.complete([1] * 13, tokens=3)  # four blocks: two empty ones and two of `new`
    assert client.complete([*old, 3], tokens=1).cached_tokens == 12
    assert client.complete([*new, 3], tokens=1).cached_tokens == 4


def test_the_model_furthest_above_its_floor_loses_blocks_first() -> None:
    specs = [spec(name, 1, 4, 24, kv_floor=floor) for name, floor in (("a", 0.3), ("b", 0.1))]
    specs.append(spec("c", 1, 4, 24, kv_floor=0.2))
    client = Client(cached(specs, 1 + 20))
    for n in range(2):  # ten blocks of b, six of a
        client.complete([n, *SYSTEM[:11]], "a", tokens=1)
        client.complete([n, *SYSTEM, 1, 2, 3], "b", tokens=1)
    b_before = stats(client.loop, "b")["kv_pages_cached"]
    for n in range(3):
        client.complete([n, n, *SYSTEM], "c", tokens=1)
    assert stats(client.loop, "a")["kv_pages_cached"] == 6  # its floor
    assert stats(client.loop, "b")["kv_pages_cached"] < b_before


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "static"])
def test_admission_is_the_same_with_a_full_cache_as_without(policy: str) -> None:
    """The number of preemptions is the same with a warm cache as without a cache."""
    preemptions = []
    for warm in (False, True):
        client = Client(Loop.create([spec("a"), spec("b", 3)], 100, policy, prefix_cache=warm))
        if warm:
            for n in range(20):
                client.complete([n] * 30, "ab"[n % 2])
            assert client.loop.scheduler.allocator.empty_slabs < 4
        client.loop.steps.clear()
        requests = [client.add([100 + n] * 21, "ab"[n % 2], tokens=20) for n in range(16)]
        client.loop.run()
        client.loop.assert_empty()
        assert all(r.output == isolated_tokens(client.loop.scheduler, r) for r in requests)
        preemptions.append(sum(request.preemptions for request in requests))
    assert preemptions[0] == preemptions[1]


def test_hits_are_on_the_replica_that_has_the_blocks() -> None:
    model = dataclasses.replace(spec("a", max_seqs=4), replicas=2)
    client = Client(cached([model]))
    loop = client.loop
    first = client.add([*SYSTEM, 1], tokens=2)
    loop.turn()
    slot = first.slot
    loop.run()
    for n in range(2, 5):
        blocker = client.add([n], tokens=20)
        request = client.add([*SYSTEM, n], tokens=4)
        while request.slot < 0:
            assert loop.turn()
        assert request.cached_tokens == 16
        assert request.slot % 2 == slot % 2
        loop.run()
        assert blocker.finished
    # No slot of that replica is free, so the other replica computes the prefix.
    waiting = [client.add([*SYSTEM, 50 + n], tokens=40) for n in range(2)]
    for _ in range(4):
        loop.turn()
    other = client.add([*SYSTEM, 99], tokens=4)
    while other.slot < 0:
        assert loop.turn()
    assert {request.slot % 2 for request in waiting} == {slot % 2}
    assert other.slot % 2 != slot % 2
    assert other.cached_tokens == 0
    loop.run()
    loop.assert_empty()
    for request in (*waiting, other):
        assert request.output == isolated_tokens(loop.scheduler, request)


def test_take_slot_returns_slots_of_the_replica() -> None:
    state = ModelState(dataclasses.replace(spec("a", max_seqs=6), replicas=3))
    assert [state.take_slot(replica) for replica in (1, 2, 0, 1)] == [1, 2, 0, 4]
    assert sorted(state.free_slots) == [3, 5]


def test_units_do_not_share_prefixes() -> None:
    specs = [spec("a")]
    Client(cached(specs)).complete([*SYSTEM, 1])
    assert Client(cached(specs)).complete([*SYSTEM, 1]).cached_tokens == 0


def test_disabled_cache_keeps_and_hashes_nothing() -> None:
    client = Client(Loop.create([spec("a")], 400))
    for _ in range(2):
        request = client.complete([*SYSTEM, 1])
        assert request.cached_tokens == 0
        assert request.block_keys == []
    assert stats(client.loop)["kv_pages_cached"] == 0
    assert stats(client.loop)["prefix_queries"] == 0


def test_concurrent_steps_have_no_cache() -> None:
    with pytest.raises(ValueError, match="concurrent steps"):
        Scheduler([spec("a")], 400, create_policy("adbs"), concurrent=True, prefix_cache=True)


@given(
    held=st.lists(st.tuples(st.integers(-4, 6), st.integers(1, 6)), max_size=5),
    part=st.floats(0, 1),
)
def test_slabs_are_evicted_as_if_one_by_one(held, part) -> None:
    count = int(part * sum(idle for _, idle in held))
    over = [(f"m{at}", above, idle) for at, (above, idle) in enumerate(held)]
    left = {name: [above, idle] for name, above, idle in over}
    evicted: dict[str, int] = {}
    for _ in range(count):
        name = max(
            (candidate for candidate in left if left[candidate][1]),
            key=lambda candidate: left[candidate][0],
        )
        left[name] = [left[name][0] - 1, left[name][1] - 1]
        evicted[name] = evicted.get(name, 0) + 1
    assert choose_evictions(over, count) == evicted
