"""Slabs that hold one block each: where all models are as deep, every slab does.

A slab is then in use, cached or empty as a whole, and nothing of it is free. So nothing is kept of
the slab itself, and many change hands at once in few operations: hundreds do in a step of a large
batch, nearly all of them cached ones that somebody else gets.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import islice

from muxjax.scheduling.kv_cache.slabs import SlabLease


class SingleBlockLease(SlabLease):
    """What a model without copies has, whose blocks take a slab each. A slab goes by its block."""

    @property
    def cached_blocks(self) -> int:
        """All of them in idle slabs."""
        return len(self.idle)

    def free_blocks(self, copy: int) -> int:
        """None, ever."""
        del copy
        return 0

    def available_blocks(self, copy: int) -> int:
        """None, ever."""
        del copy
        return 0

    def to_lease(self, num_blocks: int, shared: Iterable[int], copy: int) -> int:
        """One for each block, and for each cached one that is shared."""
        del copy
        return num_blocks + sum([block in self.idle for block in shared])

    def allocate(self, num_blocks: int, copy: int) -> list[int] | None:
        """Takes empty slabs."""
        del copy
        pool, empty = self._pool, self._pool.empty
        if num_blocks > len(empty):
            return None
        if not num_blocks:
            return []
        blocks = empty[-num_blocks:]
        del empty[-num_blocks:]
        blocks.reverse()
        pool.whole.update(dict.fromkeys(blocks, self))
        pool.changes += 1
        self.slabs += num_blocks
        self.used_blocks += num_blocks
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks in use, and takes cached ones into use."""
        pool, idle = self._pool, self.idle
        for block in blocks:
            if block in idle:
                del idle[block]
                pool.whole[block] = self
                pool.idle -= 1
                pool.changes += 1
                self.slabs += 1
                self.used_blocks += 1
            elif pool.whole.get(block) is self:
                pool.extra[block] += 1
            else:
                raise self._not_there(block)

    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """Gives back references; a slab whose last one it was is idle or empty."""
        pool, idle = self._pool, self.idle
        whole, empty, extra = pool.whole, pool.empty, pool.extra
        kept, gone = len(idle), len(empty)
        try:
            for block in blocks:
                if whole.get(block) is not self:
                    raise self._not_in_use(block)
                if extra and pool.drop_extra(block):
                    continue
                del whole[block]
                if block in keep:
                    idle[block] = None
                else:
                    empty.append(block)
        finally:  # of a block that was freed before, those before it stay counted
            kept, gone = len(idle) - kept, len(empty) - gone
            if gone:
                pool.note_freed(empty[-gone:], self.layers)
            pool.idle += kept
            pool.changes += 1
            self.slabs -= kept + gone
            self.used_blocks -= kept + gone

    def lease_roomy(self, copy: int) -> bool:
        """Never: no slab has room beside a block."""
        del copy
        return False

    def evict_block(self, copy: int) -> int:
        """There is none in a slab that is leased."""
        raise ValueError(f"{self.model} has no cached block in a slab in use, of copy {copy}")

    def evict_slabs(self, count: int) -> list[int]:
        """Empties the oldest idle slabs."""
        pool, idle = self._pool, self.idle
        blocks = list(islice(idle, count))
        for block in blocks:
            del idle[block]
        pool.empty += blocks
        pool.idle -= len(blocks)
        pool.note_freed(blocks, self.layers)
        return blocks

    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters and blocks do not agree."""
        pool = self._pool
        used = {block for block, owner in pool.whole.items() if owner is self}
        assert self.replicas == self.blocks_per_slab == 1
        assert self.slabs == self.used_blocks == len(used)
        assert not used & self.idle.keys()
        for block in (*used, *self.idle):
            assert pool.slab_of(block) == block
        return used | self.idle.keys()
