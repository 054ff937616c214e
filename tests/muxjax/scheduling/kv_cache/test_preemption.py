from __future__ import annotations

import random

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.preemption import plan_preemption
from muxjax.scheduling.kv_cache.quotas import KVQuotas
from muxjax.scheduling.requests import Request, RequestState
from tests.muxjax.scheduling.harness import spec


class Pool:
    """Models of one layer, so that a slab is a page; tests set the pages of each request."""

    def __init__(self, slabs: int, **floors: float) -> None:
        specs = [spec(name, 1, 4, 8, kv_floor=floor) for name, floor in floors.items()]
        self.allocator = SlabAllocator(1 + slabs, dict.fromkeys(floors, 1))
        self.quotas = KVQuotas(specs, self.allocator, dict.fromkeys(floors, 1.0))
        self.holders: dict[str, list[Request]] = {name: [] for name in floors}
        self.count = 0

    def hold(self, model: str, pages: int) -> Request:
        request = Request(self.count, model, [1], order=self.count, state=RequestState.RUNNING)
        self.count += 1
        blocks = self.allocator.allocate(model, pages)
        assert blocks is not None
        request.blocks = blocks
        self.holders[model].append(request)
        return request

    def plan(self, model: str, slabs: int, requester: Request | None = None) -> list[int] | None:
        victims = plan_preemption(
            self.allocator, self.quotas, self.holders, model, slabs, requester
        )
        return None if victims is None else [victim.id for victim in victims]


def test_a_floor_is_claimed_from_the_model_furthest_above_its_quota_youngest_first() -> None:
    pool = Pool(12, a=0.25, b=0.25, c=0.25)  # floors 3, quotas 4
    pool.hold("a", 2)
    pool.hold("a", 2)
    for _ in range(4):
        pool.hold("b", 2)
    assert pool.allocator.free_slabs == 0
    assert pool.plan("c", 1) == [5]
    assert pool.plan("c", 2) == [5]
    assert pool.plan("c", 3) == [5, 4]


def test_floor_claim_fails_without_slabs_above_other_floors() -> None:
    pool = Pool(4, a=0.5, b=0.5)
    pool.hold("a", 2)
    pool.hold("b", 2)
    assert pool.plan("a", 1) is None
    assert pool.plan("b", 1) is None


def test_floors_are_met_whatever_the_age() -> None:
    pool = Pool(4, a=0.5, b=0.5)
    pool.hold("a", 1)
    pool.hold("a", 3)
    assert pool.plan("b", 2) == [1]


def test_oldest_request_is_spared_while_others_can_be_preempted() -> None:
    pool = Pool(6, a=0.0, b=0.0, c=0.5)  # quotas 1 or 2 for a and b, 3 for c
    oldest = pool.hold("a", 4)
    younger = pool.hold("b", 2)
    assert pool.plan("c", 2) == [younger.id]
    assert pool.plan("c", 3) == [younger.id, oldest.id]
    oldest.state = RequestState.PREFILL
    assert pool.plan("c", 3) is None


def test_growth_preempts_younger_requests_of_the_same_model() -> None:
    pool = Pool(6, a=0.5, b=0.5)
    first, second = pool.hold("a", 1), pool.hold("a", 2)
    pool.hold("b", 3)
    assert pool.plan("a", 1, first) == [second.id]
    assert pool.plan("a", 1, second) is None


def test_growth_within_the_quota_preempts_borrowers() -> None:
    pool = Pool(10, a=0.1, b=0.1)  # quotas 5
    pool.hold("b", 2)
    pool.hold("b", 3)
    pool.hold("b", 3)
    requester = pool.hold("a", 2)
    assert pool.plan("a", 1, requester) == [2]


def test_growth_over_the_quota_preempts_only_younger_borrowers() -> None:
    pool = Pool(12, a=0.0, b=0.0, c=0.0)  # quotas 4
    anchor = pool.hold("c", 1)
    old = pool.hold("a", 5)
    pool.hold("b", 5)
    young = pool.hold("b", 1)
    assert pool.plan("a", 1, old) == [young.id]
    assert pool.plan("b", 1, young) is None
    assert pool.plan("c", 1, anchor) == [young.id]


def test_oldest_request_may_preempt_models_above_their_floors() -> None:
    pool = Pool(12, a=0.0, b=0.25)  # quotas 6, floors 0 and 3
    anchor = pool.hold("a", 6)
    kept, young = pool.hold("b", 3), pool.hold("b", 3)
    assert pool.plan("a", 3, anchor) == [young.id]
    assert kept.id not in (pool.plan("a", 3, anchor) or [])
    assert pool.plan("a", 4, anchor) is None


def test_only_request_of_a_model_is_preempted_last() -> None:
    pool = Pool(12, a=0.0, b=0.0, c=0.5)  # quotas 3, 3 and 6
    anchor, old = pool.hold("a", 1), pool.hold("a", 3)
    only = pool.hold("b", 8)
    assert pool.plan("a", 1, old) is None
    assert pool.plan("a", 1, anchor) == [old.id]
    assert pool.plan("a", 4, anchor) == [old.id, only.id]
    assert pool.plan("c", 3) == [old.id]
    assert pool.plan("c", 6) == [old.id, only.id]


def test_first_request_larger_than_its_quota_preempts_models_above_their_floor() -> None:
    pool = Pool(12, a=0.25, b=0.25)  # quotas 6, floors 3
    for _ in range(4):
        pool.hold("a", 3)
    assert pool.plan("b", 8) == [3, 2, 1]
    pool.hold("b", 0)
    assert pool.plan("b", 10) is None  # the oldest stays


def test_a_shared_block_is_freed_with_its_last_reference() -> None:
    pool = Pool(8, a=0.0, b=0.5)
    oldest = pool.hold("a", 4)
    sharing = [pool.hold("a", 1) for _ in range(3)]
    for req in sharing[1:]:  # blocks of the oldest, and one that all three have
        pool.allocator.share("a", [oldest.blocks[0], sharing[0].blocks[0]])
        req.blocks += [oldest.blocks[0], sharing[0].blocks[0]]
    assert pool.allocator.used_pages("a") == 7
    first, second, third = (req.id for req in sharing)
    assert pool.plan("b", 1) == []
    assert pool.plan("b", 2) == [third]
    assert pool.plan("b", 3) == [third, second]
    # All three are preempted: the block that they share is freed last.
    assert pool.plan("b", 4) == [third, second, first]
    pool.allocator.free("a", sharing[2].blocks)
    pool.holders["a"].remove(sharing[2])
    assert pool.plan("b", 4) == [second, first]


def test_cached_blocks_are_evicted_before_a_request_is_preempted() -> None:
    pool = Pool(8, a=0.0, b=0.5)
    pool.hold("a", 4)
    young = pool.hold("a", 3)
    ended = pool.hold("a", 1)
    pool.holders["a"].remove(ended)
    pool.allocator.free("a", ended.blocks, keep=ended.blocks)
    assert pool.allocator.empty_slabs == 0
    assert pool.plan("b", 1) == []
    assert pool.plan("b", 2) == [young.id]


def test_a_request_that_frees_no_slab_is_not_preempted() -> None:
    # Slabs of two blocks of b: the youngest request shares its slab with the oldest.
    specs = [spec("a", 2, 4, 8, kv_floor=0.5), spec("b", 1, 4, 8, kv_floor=0.0)]
    allocator = SlabAllocator(2 + 8, {"a": 2, "b": 1})
    assert allocator.slab_pages == 2
    quotas = KVQuotas(specs, allocator, {"a": 1.0, "b": 1.0})
    requests = []
    for order, pages in enumerate((1, 2, 2, 2, 1)):
        blocks = allocator.allocate("b", pages)
        assert blocks is not None
        requests.append(
            Request(order, "b", [1], order=order, blocks=blocks, state=RequestState.RUNNING)
        )
    assert allocator.free_slabs == 0
    victims = plan_preemption(allocator, quotas, {"a": [], "b": requests}, "a", 1, None)
    assert victims is not None
    chosen = {victim.id for victim in victims}

    def emptied(gone: set[int]) -> list[int]:
        held = {allocator.slab_of(b) for r in requests if r.id not in gone for b in r.blocks}
        size, first = allocator.slab_pages, allocator.dummy_pages
        slabs = range(first, first + allocator.num_slabs * size, size)
        return [slab for slab in slabs if slab not in held]

    assert 0 not in chosen
    assert emptied(chosen)
    assert not any(emptied(chosen - {victim}) for victim in chosen)


@pytest.mark.parametrize("batch", range(4))
def test_floors_can_always_be_claimed_and_the_oldest_can_always_grow(batch: int) -> None:
    for seed in range(100 * batch, 100 * batch + 100):
        check_claims(random.Random(seed))


def check_claims(rng: random.Random) -> None:
    """Checks the rules in the module's docstring on a random pool with partly used slabs."""
    deep_floor = rng.random()
    flat_floor = rng.random() * (1 - deep_floor)
    specs = [spec("deep", 3, 4, 4, kv_floor=deep_floor), spec("flat", 1, 4, 4, kv_floor=flat_floor)]
    allocator = SlabAllocator(rng.randint(12, 60), {"deep": 3, "flat": 1})
    try:
        quotas = KVQuotas(specs, allocator, {"deep": 1.0, "flat": 1.0})
    except PoolTooSmall:
        return
    holders: dict[str, list[Request]] = {"deep": [], "flat": []}
    for order in range(rng.randint(5, 60)):
        name = rng.choice(["deep", "flat"])
        blocks = allocator.allocate(name, rng.randint(1, 8))
        if blocks is None:
            continue
        req = Request(order, name, [1], order=order, blocks=blocks, state=RequestState.RUNNING)
        holders[name].append(req)
        if rng.random() < 0.3:  # some requests end, which leaves free blocks in slabs
            ended = holders[name].pop(rng.randrange(len(holders[name])))
            allocator.free(name, ended.blocks)

    for name in holders:
        unmet = quotas.floors[name] - allocator.leased_slabs(name)
        if unmet > 0:
            victims = plan_preemption(allocator, quotas, holders, name, unmet, None)
            assert victims is not None
            assert all(victim.model != name for victim in victims)

    by_age = sorted((req for held in holders.values() for req in held), key=lambda r: r.order)
    if not by_age:
        return
    oldest = by_age[0]
    # A request may grow to all slabs but the floors of other models (`compute_floors`).
    others = sum(floor for name, floor in quotas.floors.items() if name != oldest.model)
    if allocator.slabs_for(oldest.model, len(oldest.blocks) + 1) > allocator.num_slabs - others:
        return
    if allocator.slabs_to_lease(oldest.model, 1) and not quotas.leasable(oldest.model):
        victims = plan_preemption(allocator, quotas, holders, oldest.model, 1, oldest)
        assert victims
        assert oldest not in victims
        for victim in victims:
            allocator.free(victim.model, victim.blocks)
    assert allocator.slabs_to_lease(oldest.model, 1) <= quotas.leasable(oldest.model)
    assert allocator.allocate(oldest.model, 1) is not None
    allocator.check_invariants()
