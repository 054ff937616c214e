"""Leases of slabs that hold several blocks, or blocks of several replicas.

Blocks come from the leased slab with the fewest free blocks, so that the other slabs drain and
return to the pool. An idle slab is leased again with the blocks cached in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from itertools import islice

from muxjax.scheduling.kv_cache.slabs import ReplicaState, Slab, SlabLease, SlabPool


class MultiBlockLease(SlabLease):
    """Lease of a model whose slabs hold several blocks.

    Invariants, for each slab of the model and each replica:

    - a block is in exactly one of `Slab.used`, `Slab.cached` and `Slab.free_by_replica`;
    - a leased slab with `n > 0` free blocks is in `ReplicaState.slabs_by_free[n]` and nowhere else;
    - an idle slab is in `idle`, and in `ReplicaState.idle_with_free` if it has free blocks;
    - `ReplicaState.free_blocks` and `ReplicaState.cached` cover the leased slabs only.

    Attributes:
      replica_states: free and cached blocks of each replica.
      idle_cached: number of cached blocks in idle slabs.
    """

    def __init__(self, pool: SlabPool, model: str, layers: int, num_replicas: int) -> None:
        super().__init__(pool, model, layers, num_replicas)
        self.replica_states = [
            ReplicaState([{} for _ in range(self.blocks_per_slab + 1)]) for _ in range(num_replicas)
        ]
        self.idle_cached = 0

    # Counts

    @property
    def cached_blocks(self) -> int:
        """Number of cached blocks, of all replicas."""
        return self.idle_cached + sum([len(state.cached) for state in self.replica_states])

    def free_blocks(self, replica: int) -> int:
        """See `SlabAllocator.free_blocks`."""
        return self.replica_states[replica].free_blocks

    def available_blocks(self, replica: int) -> int:
        """See `SlabAllocator.available_blocks`."""
        state = self.replica_states[replica]
        return state.free_blocks + len(state.cached)

    def slabs_to_lease(self, num_blocks: int, shared: Iterable[int], replica: int) -> int:
        """See `SlabAllocator.slabs_to_lease`."""
        pool, state = self._pool, self.replica_states[replica]
        missing = num_blocks - state.free_blocks - len(state.cached)
        idle: set[int] = set()
        for block in shared:
            first = pool.slab_of(block)
            slab = pool.multi_block_slabs[first]
            missing += block in slab.cached  # a new block cannot replace a shared one
            if not slab.used:
                idle.add(first)
        missing -= len(idle) * self.blocks_per_slab
        return len(idle) + (-(-missing // self.blocks_per_slab) if missing > 0 else 0)

    # Blocks

    def allocate(self, num_blocks: int, replica: int) -> list[int] | None:
        """See `SlabAllocator.allocate`."""
        pool, state = self._pool, self.replica_states[replica]
        missing = num_blocks - state.free_blocks
        new_slabs = -(-missing // self.blocks_per_slab) if missing > 0 else 0
        if new_slabs > len(pool.empty):
            return None
        blocks: list[int] = []
        while state.nonempty_mask and len(blocks) < num_blocks:
            # The lowest bit of the mask: the fewest free blocks that a slab has.
            num_free = (state.nonempty_mask & -state.nonempty_mask).bit_length() - 1
            first = next(iter(state.slabs_by_free[num_free]))
            slab = pool.multi_block_slabs[first]
            free = slab.free_by_replica[replica]
            left = max(0, num_free - (num_blocks - len(blocks)))
            allocated = free[left:]
            del free[left:]
            slab.used.update(allocated)
            blocks += reversed(allocated)
            state.move_slab(first, num_free, left)
        if new_slabs:
            self._lease_empty_slabs(replica, new_slabs, blocks, num_blocks)
        state.free_blocks -= num_blocks
        self.used_blocks += num_blocks
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """See `SlabAllocator.share`."""
        pool = self._pool
        for block in blocks:
            first, slab = self._lookup_slab(block)
            if block in slab.used:
                pool.extra_references[block] += 1
                continue
            if block not in slab.cached:
                raise self._not_held(block)
            if not slab.used:
                self._lease_idle(first, slab)
            del slab.cached[block], self.replica_states[pool.replica_of(block)].cached[block]
            slab.used.add(block)
            self.used_blocks += 1

    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """See `SlabAllocator.free`."""
        pool = self._pool
        for block in blocks:
            first, slab = self._lookup_slab(block)
            if block not in slab.used:
                raise self._not_in_use(block)
            if pool.extra_references and pool.drop_extra_reference(block):
                continue
            slab.used.remove(block)
            self.used_blocks -= 1
            if block in keep:
                state = self.replica_states[pool.replica_of(block)]
                slab.cached[block] = state.cached[block] = None
            else:
                self._add_free_block(first, slab, block)
            if not slab.used:
                if slab.cached:
                    self._make_idle(first, slab)
                else:
                    self._make_empty(first)

    # Cached blocks

    def lease_idle_slab(self, replica: int) -> bool:
        """See `SlabAllocator.lease_idle_slab`."""
        slabs = self.replica_states[replica].idle_with_free
        if not slabs:
            return False
        first = next(reversed(slabs))
        self._lease_idle(first, self._pool.multi_block_slabs[first])
        return True

    def evict_block(self, replica: int) -> int:
        """See `SlabAllocator.evict_block`."""
        cached = self.replica_states[replica].cached
        block = next(iter(cached))
        first, slab = self._lookup_slab(block)
        del cached[block], slab.cached[block]
        self._add_free_block(first, slab, block)
        return block

    def evict_slabs(self, count: int) -> list[int]:
        """See `SlabAllocator.evict_slabs`."""
        pool = self._pool
        slabs = list(islice(self.idle, count))
        evicted: list[int] = []
        for first in slabs:
            slab = pool.multi_block_slabs[first]
            self._remove_idle(first, slab)
            del pool.multi_block_slabs[first]
            pool.record_freed_pages(slab.cached, self.layers)
            evicted += slab.cached
        pool.empty += slabs
        return evicted

    # Slabs

    def _lookup_slab(self, block: int) -> tuple[int, Slab]:
        first = self._pool.slab_of(block)
        slab = self._pool.multi_block_slabs.get(first)
        if slab is None or slab.model != self.model:
            raise self._not_in_use(block)
        return first, slab

    def _add_free_block(self, first: int, slab: Slab, block: int) -> None:
        """Adds a block to the free blocks of a leased slab."""
        pool = self._pool
        replica = pool.replica_of(block)
        state, free = self.replica_states[replica], slab.free_by_replica[replica]
        free.append(block)
        state.free_blocks += 1
        num_free = len(free)
        state.move_slab(first, num_free - 1, num_free)
        if pool.record_freed:
            page = block % pool.num_pages
            # Test mode poisons a page in all replicas, so none of them may use or cache it.
            if page not in {other % pool.num_pages for other in (*slab.used, *slab.cached)}:
                pool.record_freed_pages([block], self.layers)

    def _lease_empty_slabs(
        self, replica: int, count: int, blocks: list[int], num_blocks: int
    ) -> None:
        """Leases `count` empty slabs and extends `blocks` of a replica to `num_blocks` from them.

        The caller subtracts the allocated blocks from `ReplicaState.free_blocks`.
        """
        pool, size, layers = self._pool, self.blocks_per_slab, self.layers
        pool.lease_version += 1
        self.slabs += count
        for state in self.replica_states:
            state.free_blocks += count * size
        slabs = pool.empty[-count:]
        del pool.empty[-count:]
        for first in reversed(slabs):
            slab = pool.multi_block_slabs[first] = Slab(self.model)
            for index, state in enumerate(self.replica_states):
                start = first + index * pool.num_pages
                free = range(start, start + size * layers, layers)
                if index == replica:
                    allocated = free[: num_blocks - len(blocks)]
                    slab.used.update(allocated)
                    blocks += allocated
                    free = free[len(allocated) :]
                slab.free_by_replica.append(list(reversed(free)))
                state.move_slab(first, 0, len(free))

    def _make_empty(self, first: int) -> None:
        """Returns a leased slab whose blocks are all free to the pool."""
        pool, size = self._pool, self.blocks_per_slab
        for state in self.replica_states:
            state.move_slab(first, size, 0)
            state.free_blocks -= size
        del pool.multi_block_slabs[first]
        pool.lease_version += 1
        self.slabs -= 1
        pool.empty.append(first)

    def _make_idle(self, first: int, slab: Slab) -> None:
        """Ends the lease of a slab that has cached blocks and none in use."""
        pool = self._pool
        for state, free in zip(self.replica_states, slab.free_by_replica, strict=True):
            state.move_slab(first, len(free), 0)
            state.free_blocks -= len(free)
            if free:
                state.idle_with_free[first] = None
        for block in slab.cached:
            del self.replica_states[pool.replica_of(block)].cached[block]
        self.slabs -= 1
        self.idle[first] = None
        self.idle_cached += len(slab.cached)
        pool.num_idle += 1
        pool.lease_version += 1

    def _lease_idle(self, first: int, slab: Slab) -> None:
        """Leases an idle slab; its cached blocks stay cached."""
        pool = self._pool
        self._remove_idle(first, slab)
        for block in slab.cached:
            self.replica_states[pool.replica_of(block)].cached[block] = None
        self.slabs += 1
        for state, free in zip(self.replica_states, slab.free_by_replica, strict=True):
            state.free_blocks += len(free)
            state.move_slab(first, 0, len(free))
        pool.lease_version += 1

    def _remove_idle(self, first: int, slab: Slab) -> None:
        """Removes a slab from the idle ones; the caller leases or empties it."""
        del self.idle[first]
        for state in self.replica_states:
            state.idle_with_free.pop(first, None)
        self.idle_cached -= len(slab.cached)
        self._pool.num_idle -= 1

    # Tests

    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters, blocks and slabs do not agree."""
        pool, expected = self._pool, Counter[str]()
        slabs = {
            first: slab
            for first, slab in pool.multi_block_slabs.items()
            if slab.model == self.model
        }
        assert self.blocks_per_slab * self.layers <= pool.slab_pages
        for first, slab in slabs.items():
            assert slab.used or slab.cached, f"slab {first} is held and empty"
            leased = bool(slab.used)
            assert (first in self.idle) == (not leased)
            self._check_blocks(first, slab)
            expected["used"] += len(slab.used)
            expected["slabs" if leased else "idle"] += 1
            expected["cached" if leased else "idle_cached"] += len(slab.cached)
            for index, state in enumerate(self.replica_states):
                num_free = len(slab.free_by_replica[index])
                expected[f"free of {index}"] += num_free if leased else 0
                assert (first in state.idle_with_free) == (not leased and num_free > 0)
                counts = [n for n, group in enumerate(state.slabs_by_free) if first in group]
                assert counts == ([num_free] if leased and num_free else [])
            for block in slab.cached:
                state = self.replica_states[pool.replica_of(block)]
                assert (block in state.cached) == leased
        counters = {
            "used": self.used_blocks,
            "slabs": self.slabs,
            "cached": sum(len(state.cached) for state in self.replica_states),
            "idle": len(self.idle),
            "idle_cached": self.idle_cached,
        }
        for index, state in enumerate(self.replica_states):
            counters[f"free of {index}"] = state.free_blocks
            for count, group in enumerate(state.slabs_by_free):
                assert bool(group) == bool(state.nonempty_mask >> count & 1)
        wrong = {key: value for key, value in counters.items() if value != expected[key]}
        assert not wrong, f"{self.model} counts {wrong}, its slabs hold {dict(expected)}"
        return set(slabs)

    def _check_blocks(self, first: int, slab: Slab) -> None:
        """Each block of a slab is in use, cached or free, and only one of these."""
        pool = self._pool
        free = [block for blocks in slab.free_by_replica for block in blocks]
        blocks = Counter(
            divmod(block, pool.num_pages) for block in (*slab.used, *slab.cached, *free)
        )
        assert blocks == {
            (replica, first + index * self.layers): 1
            for replica in range(self.num_replicas)
            for index in range(self.blocks_per_slab)
        }
        for replica, replica_blocks in enumerate(slab.free_by_replica):
            assert {pool.replica_of(block) for block in replica_blocks} <= {replica}
