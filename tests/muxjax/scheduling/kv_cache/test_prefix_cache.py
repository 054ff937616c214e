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
from tests.muxjax.scheduling.harness import Loop, solo_tokens, spec

SYSTEM = [(7 * i * i + 5) % 1009 for i in range(16)]
"""Four blocks of four tokens."""


def cached(specs: list[ModelSpec], pages: int = 400, policy: str = "adbs") -> Loop:
    return Loop.of(specs, pages, policy, prefix_cache=True)


class Asker:
    """Runs one request after the other and compares its output with that of an idle unit."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.count = 0

    def add(
        self, prompt: list[int], model: str = "a", tokens: int = 6, **params: object
    ) -> Request:
        settings = SamplingParams(max_tokens=tokens, temperature=0.0, **params)
        request = Request(self.count, model, prompt, settings)
        self.count += 1
        self.loop.unit.add(request)
        return request

    def ask(
        self, prompt: list[int], model: str = "a", tokens: int = 6, **params: object
    ) -> Request:
        request = self.add(prompt, model, tokens, **params)
        self.loop.run()
        self.loop.assert_empty()
        assert request.output == solo_tokens(self.loop.unit, request)
        return request


@pytest.fixture
def asker() -> Asker:
    return Asker(cached([spec("a"), spec("b", 3)]))


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
    return loop.unit.stats()["models"][model]


def test_a_cached_prefix_is_not_computed(asker: Asker) -> None:
    first = asker.ask([*SYSTEM, 1])
    second = asker.ask([*SYSTEM, 2, 3])
    assert (first.cached_tokens, second.cached_tokens) == (0, 16)
    assert prefilled(asker.loop, first) == 17
    assert prefilled(asker.loop, second) == 2
    assert stats(asker.loop)["prefix_queries"] == 35
    assert stats(asker.loop)["prefix_hits"] == 16


@pytest.mark.parametrize(("length", "found"), [(3, 0), (4, 0), (5, 4), (15, 12), (16, 12)])
def test_the_last_token_is_always_computed(asker: Asker, length: int, found: int) -> None:
    asker.ask(SYSTEM)
    request = asker.ask(SYSTEM[:length])
    assert request.cached_tokens == found
    assert prefilled(asker.loop, request) == length - found


def test_a_conversation_goes_on_from_the_answer(asker: Asker) -> None:
    first = asker.ask(SYSTEM, tokens=9)
    # Of 25 tokens the last was never written: six blocks.
    second = asker.ask([*SYSTEM, *first.output, 5])
    assert second.cached_tokens == 24


def test_other_models_prompts_and_salts_find_nothing(asker: Asker) -> None:
    asker.ask([*SYSTEM, 1])
    assert asker.ask([*SYSTEM, 2], "b").cached_tokens == 0
    assert asker.ask([SYSTEM[0] + 1, *SYSTEM[1:], 2]).cached_tokens == 0
    assert asker.ask([*SYSTEM[:8], 0, *SYSTEM[9:], 2]).cached_tokens == 8
    assert asker.ask([*SYSTEM, 2], cache_salt="mine").cached_tokens == 0
    assert asker.ask([*SYSTEM, 3], cache_salt="mine").cached_tokens == 16
    assert asker.ask([*SYSTEM, 3], cache_salt="other").cached_tokens == 0


def test_requests_that_need_all_positions_find_nothing_and_are_cached(asker: Asker) -> None:
    asker.ask([*SYSTEM, 1])
    for params in ({"prompt_logprobs": 1}, {"repetition_penalty": 1.5}):
        request = asker.ask([*SYSTEM, 2], **params)
        assert request.cached_tokens == 0
        assert prefilled(asker.loop, request) == 17
    assert asker.ask([*SYSTEM, 2], presence_penalty=0.5).cached_tokens == 16
    fresh = [token + 1 for token in SYSTEM]
    asker.ask(fresh, repetition_penalty=1.5)
    assert asker.ask([*fresh, 2]).cached_tokens == 16
    assert stats(asker.loop)["prefix_queries"] == 17 + 17 + 17


@pytest.mark.parametrize(("penalty", "found"), [(0.5, 16), (0.0, 24)])
def test_a_penalty_counts_what_was_put_out_before(asker: Asker, penalty: float, found: int) -> None:
    first = asker.ask(SYSTEM, tokens=12, presence_penalty=penalty)
    # Goes on elsewhere after 9 tokens, as the router has it do.
    params = dataclasses.replace(first.params, max_tokens=20)
    again = Request(99, "a", SYSTEM, params, output=first.output[:9])
    asker.loop.unit.add(again)
    asker.loop.run()
    assert again.found_tokens == found
    assert again.output == solo_tokens(asker.loop.unit, again)


def test_requests_that_run_share_blocks(asker: Asker) -> None:
    loop = asker.loop
    first = asker.add([*SYSTEM, 1], tokens=30)
    for _ in range(4):
        loop.turn()
    alone = stats(loop)["kv_pages_used"]
    others = [asker.add([*SYSTEM, n], tokens=4) for n in (2, 3)]
    loop.turn()
    loop.turn()
    assert [other.cached_tokens for other in others] == [16, 16]
    assert stats(loop)["kv_pages_used"] < alone + 2 * 2 * 4
    assert others[0].blocks[:4] == others[1].blocks[:4] == first.blocks[:4]
    loop.unit.cancel(first.id)
    loop.run()
    loop.assert_empty()
    for other in others:
        assert other.output == solo_tokens(loop.unit, other)


def test_a_request_in_the_same_step_finds_nothing_yet(asker: Asker) -> None:
    one, two = asker.add(SYSTEM[:8]), asker.add(SYSTEM[:8])
    asker.loop.run()
    asker.loop.assert_empty()
    assert (one.cached_tokens, two.cached_tokens) == (0, 0)
    assert one.output == two.output
    assert asker.ask(SYSTEM[:9]).cached_tokens == 8


def test_a_cancelled_request_leaves_what_its_steps_have_written() -> None:
    asker = Asker(cached([spec("a", prefill_tokens=6)]))
    request = asker.add([*SYSTEM, 1])
    for _ in range(2):  # 12 tokens of 17
        asker.loop.turn()
    assert request.dispatched == 12
    asker.loop.unit.cancel(request.id)
    asker.loop.run()
    assert asker.ask([*SYSTEM, 1]).cached_tokens == 12


def test_a_preempted_request_finds_its_own_blocks() -> None:
    specs = [spec("a", 1, 4, 64, max_seqs=2, kv_floor=0.0), spec("b", 1, 4, 64, kv_floor=0.6)]
    asker = Asker(cached(specs, 1 + 40))
    loop = asker.loop
    asker.add(SYSTEM[:8], tokens=40)
    victim = asker.add([*SYSTEM, 1], tokens=40)
    while victim.preemptions == 0:
        if loop.unit.num_requests < 4:
            asker.add([token + asker.count for token in SYSTEM], "b", tokens=30)
        assert loop.turn()
    loop.run()
    loop.assert_empty()
    assert victim.output == solo_tokens(loop.unit, victim)
    assert victim.cached_tokens == 0  # what it was asked with, and not its own
    assert prefilled(loop, victim) < 2 * len(victim.prompt)


def test_free_pages_are_taken_before_cached_ones() -> None:
    # Two blocks of b in a slab, and one of a.
    asker = Asker(cached([spec("a", 2, 4, 32), spec("b", 1, 4, 32)], 2 + 2 * 64))
    unit = asker.loop.unit
    for n in range(12):
        asker.ask([n, *SYSTEM], "b" if n % 2 else "a")
    assert unit.allocator.empty_slabs > 0
    for n in range(12):
        assert asker.ask([n, *SYSTEM], "b" if n % 2 else "a").cached_tokens == 16
    found = unit.stats()
    idle = found["free_pages"] + found["cached_pages"]
    assert idle == found["usable_pages"]
    assert found["models"]["a"]["kv_pages_used"] == 0
    # Prompt and answer are 23 tokens, of which the last is not written: five full blocks.
    assert found["models"]["a"]["kv_pages_cached"] == 2 * 6 * 5
    assert found["models"]["b"]["kv_pages_cached"] == 6 * 5


def test_the_oldest_goes_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    asker = Asker(cached([spec("a", 1, 4, 24, max_seqs=1)], 1 + 13))
    old, new = SYSTEM[:12], [token + 1 for token in SYSTEM[:12]]
    asker.ask([*old, 1], tokens=1)
    asker.ask([*new, 1], tokens=1)
    asker.ask([*old, 2], tokens=1)  # used again, so that `new` is older
    asker.ask([0] * 17, tokens=7)  # six of the seven empty blocks, of which five stay
    asker.ask([1] * 13, tokens=3)  # four: two that are empty, and two of `new`
    assert asker.ask([*old, 3], tokens=1).cached_tokens == 12
    assert asker.ask([*new, 3], tokens=1).cached_tokens == 4


def test_the_model_furthest_above_its_floor_loses_blocks_first() -> None:
    specs = [spec(name, 1, 4, 24, kv_floor=floor) for name, floor in (("a", 0.3), ("b", 0.1))]
    specs.append(spec("c", 1, 4, 24, kv_floor=0.2))
    asker = Asker(cached(specs, 1 + 20))
    for n in range(2):  # ten blocks of b, six of a
        asker.ask([n, *SYSTEM[:11]], "a", tokens=1)
        asker.ask([n, *SYSTEM, 1, 2, 3], "b", tokens=1)
    b_before = stats(asker.loop, "b")["kv_pages_cached"]
    for n in range(3):
        asker.ask([n, n, *SYSTEM], "c", tokens=1)
    assert stats(asker.loop, "a")["kv_pages_cached"] == 6  # its floor
    assert stats(asker.loop, "b")["kv_pages_cached"] < b_before


@pytest.mark.parametrize("policy", ["adbs", "fcfs", "static"])
def test_admission_is_the_same_with_a_full_cache_as_without(policy: str) -> None:
    """Cached pages delay no request: as many preemptions with a warm cache as without."""
    shapes = []
    for warm in (False, True):
        asker = Asker(Loop.of([spec("a"), spec("b", 3)], 100, policy, prefix_cache=warm))
        if warm:
            for n in range(20):
                asker.ask([n] * 30, "ab"[n % 2])
            assert asker.loop.unit.allocator.empty_slabs < 4
        asker.loop.steps.clear()
        requests = [asker.add([100 + n] * 21, "ab"[n % 2], tokens=20) for n in range(16)]
        asker.loop.run()
        asker.loop.assert_empty()
        assert all(r.output == solo_tokens(asker.loop.unit, r) for r in requests)
        shapes.append(sum(request.preemptions for request in requests))
    assert shapes[0] == shapes[1]


def test_hits_are_on_the_replica_that_has_the_blocks() -> None:
    model = dataclasses.replace(spec("a", max_seqs=4), replicas=2)
    asker = Asker(cached([model]))
    loop = asker.loop
    first = asker.add([*SYSTEM, 1], tokens=2)
    loop.turn()
    slot = first.slot
    loop.run()
    for n in range(2, 5):
        blocker = asker.add([n], tokens=20)
        request = asker.add([*SYSTEM, n], tokens=4)
        while request.slot < 0:
            assert loop.turn()
        assert request.cached_tokens == 16
        assert request.slot % 2 == slot % 2
        loop.run()
        assert blocker.finished
    # No slot of that replica is free: the other replica computes and then has the blocks.
    waiting = [asker.add([*SYSTEM, 50 + n], tokens=40) for n in range(2)]
    for _ in range(4):
        loop.turn()
    other = asker.add([*SYSTEM, 99], tokens=4)
    while other.slot < 0:
        assert loop.turn()
    assert {request.slot % 2 for request in waiting} == {slot % 2}
    assert other.slot % 2 != slot % 2
    assert other.cached_tokens == 0
    loop.run()
    loop.assert_empty()
    for request in (*waiting, other):
        assert request.output == solo_tokens(loop.unit, request)


def test_taking_the_slot_of_a_replica_leaves_the_others() -> None:
    state = ModelState(dataclasses.replace(spec("a", max_seqs=6), replicas=3))
    assert [state.take_slot(replica) for replica in (1, 2, 0, 1)] == [1, 2, 0, 4]
    assert sorted(state.free_slots) == [3, 5]


def test_nothing_is_found_across_units() -> None:
    specs = [spec("a")]
    Asker(cached(specs)).ask([*SYSTEM, 1])
    assert Asker(cached(specs)).ask([*SYSTEM, 1]).cached_tokens == 0


def test_a_unit_without_a_cache_keeps_and_hashes_nothing() -> None:
    asker = Asker(Loop.of([spec("a")], 400))
    for _ in range(2):
        request = asker.ask([*SYSTEM, 1])
        assert request.cached_tokens == 0
        assert request.block_keys == []
    assert stats(asker.loop)["kv_pages_cached"] == 0
    assert stats(asker.loop)["prefix_queries"] == 0


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
    taken: dict[str, int] = {}
    for _ in range(count):
        name = max((one for one in left if left[one][1]), key=lambda one: left[one][0])
        left[name] = [left[name][0] - 1, left[name][1] - 1]
        taken[name] = taken.get(name, 0) + 1
    assert choose_evictions(over, count) == taken
