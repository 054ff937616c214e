from __future__ import annotations

from muxjax.scheduling.kv_cache.slabs import ReplicaState, SlabPool


def pool(record_freed: bool = False) -> SlabPool:
    """Four slabs of six pages behind a dummy block of three."""
    return SlabPool(27, 6, 3, record_freed, [21, 15, 9, 3])


def test_the_slab_and_the_replica_of_a_block() -> None:
    slabs = pool()
    assert [slabs.slab_of(block) for block in (3, 6, 9, 14, 21)] == [3, 3, 9, 9, 21]
    assert slabs.slab_of(2 * 27 + 14) == 9
    assert [slabs.replica_of(block) for block in (3, 26, 27 + 3, 2 * 27 + 14)] == [0, 0, 1, 2]


def test_freed_pages_are_recorded_if_requested() -> None:
    quiet, recording = pool(), pool(record_freed=True)
    for slabs in (quiet, recording):
        slabs.record_freed_pages([3, 27 + 9], 2)
    assert quiet.freed_pages == []
    assert recording.freed_pages == [3, 4, 9, 10]


def test_only_references_beyond_the_first_are_dropped() -> None:
    slabs = pool()
    slabs.extra_references[3] += 2
    assert [slabs.drop_extra_reference(3) for _ in range(3)] == [True, True, False]
    assert not slabs.extra_references


def test_slabs_are_grouped_by_free_blocks() -> None:
    state = ReplicaState([{} for _ in range(4)])
    state.move_slab(3, 0, 3)
    state.move_slab(9, 0, 3)
    assert list(state.slabs_by_free[3]) == [3, 9]
    assert state.nonempty_mask == 0b1000
    state.move_slab(3, 3, 1)
    assert state.nonempty_mask == 0b1010
    state.move_slab(9, 3, 0)
    state.move_slab(3, 1, 0)
    assert state.nonempty_mask == 0
    assert not any(state.slabs_by_free)
