"""Slabs that hold one block each; `test_allocator.py` tests pools with mixed slabs."""

from __future__ import annotations

import pytest

from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.multi_block_slab import MultiBlockLease
from muxjax.scheduling.kv_cache.single_block_slab import SingleBlockLease
from muxjax.scheduling.kv_cache.slabs import SlabPool


def lease_of(slabs: int, layers: int = 3, record_freed: bool = False) -> SingleBlockLease:
    empty = [layers * (1 + at) for at in reversed(range(slabs))]
    pool = SlabPool(layers * (1 + slabs), layers, layers, record_freed, empty)
    return SingleBlockLease(pool, "a", layers, 1)


def test_a_model_has_single_block_slabs_if_its_blocks_fill_them() -> None:
    allocator = SlabAllocator(3 + 12, {"a": 3, "b": 2, "c": 1, "d": 3}, {"d": 2})
    kinds = {name: type(lease) for name, lease in allocator._leases.items()}
    assert kinds == {
        "a": SingleBlockLease,
        "b": SingleBlockLease,
        "c": MultiBlockLease,
        "d": MultiBlockLease,
    }


def test_a_block_is_in_use_then_idle_then_empty() -> None:
    lease = lease_of(4)
    blocks = lease.allocate(3, 0)
    assert blocks == [3, 6, 9]
    assert (lease.slabs, lease.free_blocks(0), lease.available_blocks(0)) == (3, 0, 0)
    lease.free([9, 6], keep={6})
    lease.check_invariants()
    assert (lease.slabs, list(lease.idle), lease.cached_blocks) == (1, [6], 1)
    assert lease.slabs_to_lease(2, [3, 6], 0) == 3
    lease.share([6, 3])
    assert (lease.slabs, list(lease.idle)) == (2, [])
    lease.free([3, 3, 6], keep={3, 6})
    lease.check_invariants()
    assert list(lease.idle) == [3, 6]
    assert lease.evict_slabs(1) == [3]
    assert lease.allocate(4, 0) is None
    assert lease.allocate(3, 0) == [3, 9, 12]
    lease.check_invariants()


def test_unsupported_operations_of_single_block_slabs() -> None:
    lease = lease_of(1)
    assert lease.allocate(0, 0) == []
    assert not lease.lease_idle_slab(0)
    with pytest.raises(ValueError, match="no cached block"):
        lease.evict_block(0)
    with pytest.raises(ValueError, match="neither in use nor cached by a"):
        lease.share([3])
    with pytest.raises(ValueError, match="not in use by a"):
        lease.free([3], ())


def test_freed_pages_are_recorded() -> None:
    lease = lease_of(2, record_freed=True)
    lease.allocate(2, 0)
    lease.free([3, 6], keep={3})
    assert lease._pool.freed_pages == [6, 7, 8]
    lease.evict_slabs(1)
    assert lease._pool.freed_pages == [6, 7, 8, 3, 4, 5]


def test_a_block_that_is_freed_twice_leaves_the_others_counted() -> None:
    lease = lease_of(3, record_freed=True)
    lease.allocate(3, 0)
    with pytest.raises(ValueError, match="block at page 3 is not in use by a"):
        lease.free([6, 3, 3, 9], keep={6})
    lease.check_invariants()
    assert (lease.slabs, list(lease.idle), lease._pool.freed_pages) == (1, [6], [3, 4, 5])
