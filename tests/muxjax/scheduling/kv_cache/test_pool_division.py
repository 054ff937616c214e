from __future__ import annotations

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.pool_division import FixedPool, OpenPool
from tests.muxjax.scheduling.harness import Loop, request, spec


def test_an_open_pool_leases_in_order_of_arrival() -> None:
    specs = [spec("a", 1, 4, 40), spec("b", 1, 4, 40, kv_floor=0.5)]
    allocator = SlabAllocator(41, {"a": 1, "b": 1})
    pool = OpenPool(specs, allocator, {"a": 1.0, "b": 9.0})
    assert pool.leasable("a") == 40
    allocator.allocate("b", 30)
    assert pool.leasable("a") == 10
    assert pool.over_quota("b") < 0
    assert not pool.due(1e9)
    pool.check_invariants()


def test_other_models_cannot_borrow_a_fixed_part() -> None:
    specs = [spec("a", 2, 4, 64, max_seqs=64), spec("b", 2, 4, 64, max_seqs=64)]
    loop = Loop.create(specs, 2 + 2 * 64, "static", kv_quotas=FixedPool)
    parts = dict(loop.scheduler.quotas.quotas)
    for number in range(40):
        loop.scheduler.add(request(number, "a", prompt_tokens=20, max_tokens=20))
    for _ in range(60):
        loop.turn()
        assert loop.scheduler.allocator.leased_slabs("a") <= parts["a"]
    assert loop.scheduler.models["a"].waiting
    loop.run()
    assert loop.scheduler.quotas.quotas == parts
    loop.assert_empty()


def test_a_pool_without_room_for_a_request_of_each_is_refused() -> None:
    specs = [spec(name, 2, 4, 64) for name in "abc"]
    with pytest.raises(PoolTooSmall, match="a fixed part for each model"):
        Loop.create(specs, 2 + 2 * 40, "static", kv_quotas=FixedPool)
