"""Leases of slabs that hold one block each, as all slabs do if all models have the same depth.

Such a slab is empty, leased or idle as a whole, and a leased one never has a free block. No state
is therefore kept per slab, and the methods change many slabs in few operations: one step of a large
batch can move hundreds of slabs, most of them cached by another model.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import islice

from muxjax.scheduling.kv_cache.slabs import SlabLease


class SingleBlockLease(SlabLease):
    """Lease of a model with one replica whose blocks fill a slab. A slab has the id of its block.

    Invariant: `slabs == used_blocks`, and the cached blocks are the idle slabs.
    """

    @property
    def cached_blocks(self) -> int:
        """Number of cached blocks, all of them in idle slabs."""
        return len(self.idle)

    def free_blocks(self, replica: int) -> int:
        """Always 0: a leased slab has no free block."""
        del replica
        return 0

    def available_blocks(self, replica: int) -> int:
        """Always 0: a leased slab has neither a free nor a cached block."""
        del replica
        return 0

    def slabs_to_lease(self, num_blocks: int, shared: Iterable[int], replica: int) -> int:
        """One slab for each block, and one for each cached block in `shared`."""
        del replica
        return num_blocks + sum([block in self.idle for block in shared])

    def allocate(self, num_blocks: int, replica: int) -> list[int] | None:
        """See `SlabAllocator.allocate`."""
        del replica
        pool, empty = self._pool, self._pool.empty
        if num_blocks > len(empty):
            return None
        if not num_blocks:
            return []
        blocks = empty[-num_blocks:]
        del empty[-num_blocks:]
        blocks.reverse()
        pool.single_block_owners.update(dict.fromkeys(blocks, self))
        pool.lease_version += 1
        self.slabs += num_blocks
        self.used_blocks += num_blocks
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """See `SlabAllocator.share`."""
        pool, idle = self._pool, self.idle
        for block in blocks:
            if block in idle:
                del idle[block]
                pool.single_block_owners[block] = self
                pool.num_idle -= 1
                pool.lease_version += 1
                self.slabs += 1
                self.used_blocks += 1
            elif pool.single_block_owners.get(block) is self:
                pool.extra_references[block] += 1
            else:
                raise self._not_held(block)

    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """See `SlabAllocator.free`."""
        pool, idle = self._pool, self.idle
        owners, empty, extra = pool.single_block_owners, pool.empty, pool.extra_references
        num_idle, num_empty = len(idle), len(empty)
        try:
            for block in blocks:
                if owners.get(block) is not self:
                    raise self._not_in_use(block)
                if extra and pool.drop_extra_reference(block):
                    continue
                del owners[block]
                if block in keep:
                    idle[block] = None
                else:
                    empty.append(block)
        finally:  # the counters must also include the blocks before one that was freed twice
            new_idle, new_empty = len(idle) - num_idle, len(empty) - num_empty
            if new_empty:
                pool.record_freed_pages(empty[-new_empty:], self.layers)
            pool.num_idle += new_idle
            pool.lease_version += 1
            self.slabs -= new_idle + new_empty
            self.used_blocks -= new_idle + new_empty

    def lease_idle_slab(self, replica: int) -> bool:
        """Always False: an idle slab has no free block."""
        del replica
        return False

    def evict_block(self, replica: int) -> int:
        """Raises ValueError: a leased slab has no cached block."""
        raise ValueError(
            f"replica {replica} of {self.model} has no cached block in a leased slab: slabs hold "
            f"one block each"
        )

    def evict_slabs(self, count: int) -> list[int]:
        """See `SlabAllocator.evict_slabs`."""
        pool, idle = self._pool, self.idle
        blocks = list(islice(idle, count))
        for block in blocks:
            del idle[block]
        pool.empty += blocks
        pool.num_idle -= len(blocks)
        pool.record_freed_pages(blocks, self.layers)
        return blocks

    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters and blocks do not agree."""
        pool = self._pool
        used = {block for block, lease in pool.single_block_owners.items() if lease is self}
        assert self.num_replicas == self.blocks_per_slab == 1
        assert self.slabs == self.used_blocks == len(used)
        assert not used & self.idle.keys()
        for block in (*used, *self.idle):
            assert pool.slab_of(block) == block
        return used | self.idle.keys()
