"""Slabs of several blocks; `test_allocator.py` tests pools with mixed slabs."""

from __future__ import annotations

import pytest

from muxjax.scheduling.kv_cache.multi_block_slab import MultiBlockLease
from muxjax.scheduling.kv_cache.slabs import SlabPool


def lease_of(slabs: int, replicas: int = 1) -> MultiBlockLease:
    """Three blocks of two pages in a slab, behind a dummy block of two pages."""
    empty = [2 + 6 * index for index in reversed(range(slabs))]
    return MultiBlockLease(SlabPool(2 + 6 * slabs, 6, 2, True, empty), "a", 2, replicas)


def test_the_slab_with_the_fewest_free_blocks_is_used_first() -> None:
    lease = lease_of(3)
    assert lease.allocate(6, 0) == [2, 4, 6, 8, 10, 12]
    lease.free([2, 4, 8], ())
    assert (lease.slabs, lease.free_blocks(0)) == (2, 3)
    assert lease.allocate(2, 0) == [8, 4]
    lease.check_invariants()


def test_all_blocks_or_none() -> None:
    lease = lease_of(1)
    assert lease.allocate(2, 0) == [2, 4]
    assert lease.allocate(2, 0) is None
    assert lease.allocate(1, 0) == [6]
    lease.check_invariants()


def test_a_slab_with_cached_blocks_only_is_idle_until_one_is_shared() -> None:
    lease = lease_of(2)
    lease.allocate(2, 0)
    lease.free([2, 4], keep={2})
    lease.check_invariants()
    assert (lease.slabs, list(lease.idle), lease.cached_blocks) == (0, [2], 1)
    assert (lease.free_blocks(0), lease.available_blocks(0)) == (0, 0)
    assert lease.slabs_to_lease(2, [2], 0) == 1
    lease.share([2])
    lease.check_invariants()
    assert (lease.slabs, lease.free_blocks(0), lease.cached_blocks) == (1, 2, 0)


def test_free_blocks_of_an_idle_slab_can_be_leased() -> None:
    lease = lease_of(1)
    assert not lease.lease_idle_slab(0)
    lease.allocate(3, 0)
    lease.free([4, 2, 6], keep={4, 6})
    assert lease.lease_idle_slab(0)
    assert lease.allocate(1, 0) == [2]
    lease.check_invariants()
    assert lease.available_blocks(0) == 2
    assert lease.evict_block(0) == 4  # the oldest
    assert (lease.free_blocks(0), lease.cached_blocks) == (1, 1)
    lease.check_invariants()


def test_an_evicted_slab_is_empty() -> None:
    lease = lease_of(2)
    lease.allocate(4, 0)
    lease.free([2, 4, 6, 8], keep={2, 8})
    assert lease.evict_slabs(1) == [2]
    lease.check_invariants()
    assert lease._pool.empty == [2]
    assert lease._pool.num_idle == 1
    assert sorted(lease._pool.freed_pages) == [2, 3, 4, 5, 6, 7]


def test_each_replica_has_blocks_in_a_leased_slab() -> None:
    lease = lease_of(1, replicas=2)
    first, second = lease.allocate(1, 0), lease.allocate(3, 1)
    assert first == [2]
    assert second == [10, 12, 14]
    assert (lease.slabs, lease.free_blocks(0), lease.free_blocks(1)) == (1, 2, 0)
    lease.free([2], ())
    assert lease.slabs == 1
    assert lease._pool.freed_pages == []  # the other replica uses these pages
    lease.check_invariants()


def test_blocks_that_are_not_in_use_are_refused() -> None:
    lease = lease_of(1)
    lease.allocate(1, 0)
    with pytest.raises(ValueError, match="block at page 4 is not in use by a"):
        lease.free([4], ())
    with pytest.raises(ValueError, match="block at page 4 is neither in use nor cached by a"):
        lease.share([4])
