"""Slabs that are cut into several blocks, or of which each copy of a model has blocks of its own.

Blocks come from the fullest slab that has room, so that the emptier ones drain and return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from itertools import islice

from muxjax.scheduling.kv_cache.slabs import ReplicaState, Slab, SlabLease, SlabPool


class MultiBlockLease(SlabLease):
    """What a model has whose slabs hold several blocks.

    Attributes:
      parts: what each copy has.
      idle_cached: cached blocks in idle slabs.
    """

    def __init__(self, pool: SlabPool, model: str, layers: int, replicas: int) -> None:
        super().__init__(pool, model, layers, replicas)
        self.parts = [
            ReplicaState([{} for _ in range(self.blocks_per_slab + 1)]) for _ in range(replicas)
        ]
        self.idle_cached = 0

    # What there is

    @property
    def cached_blocks(self) -> int:
        """Cached blocks of all copies."""
        return self.idle_cached + sum([len(part.cached) for part in self.parts])

    def free_blocks(self, copy: int) -> int:
        """Free blocks of a copy in the slabs that are leased."""
        return self.parts[copy].free_blocks

    def available_blocks(self, copy: int) -> int:
        """Those and the cached ones."""
        part = self.parts[copy]
        return part.free_blocks + len(part.cached)

    def to_lease(self, num_blocks: int, shared: Iterable[int], copy: int) -> int:
        """See `SlabAllocator.slabs_to_lease`."""
        pool, part = self._pool, self.parts[copy]
        missing = num_blocks - part.free_blocks - len(part.cached)
        idle: set[int] = set()
        for block in shared:
            first = pool.slab_of(block)
            slab = pool.cut[first]
            missing += block in slab.cached
            if not slab.used:
                idle.add(first)
        missing -= len(idle) * self.blocks_per_slab
        return len(idle) + (-(-missing // self.blocks_per_slab) if missing > 0 else 0)

    # Blocks

    def allocate(self, num_blocks: int, copy: int) -> list[int] | None:
        """See `SlabAllocator.allocate`."""
        pool, part = self._pool, self.parts[copy]
        missing = num_blocks - part.free_blocks
        new_slabs = -(-missing // self.blocks_per_slab) if missing > 0 else 0
        if new_slabs > len(pool.empty):
            return None
        blocks: list[int] = []
        while part.mask and len(blocks) < num_blocks:
            fullest = (part.mask & -part.mask).bit_length() - 1
            first = next(iter(part.partial[fullest]))
            slab = pool.cut[first]
            free = slab.free[copy]
            left = max(0, fullest - (num_blocks - len(blocks)))
            taken = free[left:]
            del free[left:]
            slab.used.update(taken)
            blocks += reversed(taken)
            part.file(first, fullest, left)
        if new_slabs:
            self._lease_slabs(copy, new_slabs, blocks, num_blocks)
        part.free_blocks -= num_blocks
        self.used_blocks += num_blocks
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """See `SlabAllocator.share`."""
        pool = self._pool
        for block in blocks:
            first, slab = self._find(block)
            if block in slab.used:
                pool.extra[block] += 1
                continue
            if block not in slab.cached:
                raise self._not_there(block)
            if not slab.used:
                self._lease_idle(first, slab)
            del slab.cached[block], self.parts[pool.copy_of(block)].cached[block]
            slab.used.add(block)
            self.used_blocks += 1

    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """See `SlabAllocator.free`."""
        pool = self._pool
        for block in blocks:
            first, slab = self._find(block)
            if block not in slab.used:
                raise self._not_in_use(block)
            if pool.extra and pool.drop_extra(block):
                continue
            slab.used.remove(block)
            self.used_blocks -= 1
            if block in keep:
                slab.cached[block] = self.parts[pool.copy_of(block)].cached[block] = None
            else:
                self._set_free(first, slab, block)
            if not slab.used:
                if slab.cached:
                    self._end_lease(first, slab)
                else:
                    self._return_slab(first)

    # Cached blocks

    def lease_roomy(self, copy: int) -> bool:
        """See `SlabAllocator.lease_roomy`."""
        roomy = self.parts[copy].roomy
        if not roomy:
            return False
        first = next(reversed(roomy))
        self._lease_idle(first, self._pool.cut[first])
        return True

    def evict_block(self, copy: int) -> int:
        """See `SlabAllocator.evict_block`."""
        cached = self.parts[copy].cached
        block = next(iter(cached))
        first, slab = self._find(block)
        del cached[block], slab.cached[block]
        self._set_free(first, slab, block)
        return block

    def evict_slabs(self, count: int) -> list[int]:
        """See `SlabAllocator.evict_slabs`."""
        pool = self._pool
        slabs = list(islice(self.idle, count))
        evicted: list[int] = []
        for first in slabs:
            slab = pool.cut[first]
            self._unfile_idle(first, slab)
            del pool.cut[first]
            pool.note_freed(slab.cached, self.layers)
            evicted += slab.cached
        pool.empty += slabs
        return evicted

    # Slabs

    def _find(self, block: int) -> tuple[int, Slab]:
        first = self._pool.slab_of(block)
        slab = self._pool.cut.get(first)
        if slab is None or slab.model != self.model:
            raise self._not_in_use(block)
        return first, slab

    def _set_free(self, first: int, slab: Slab, block: int) -> None:
        """Makes a block of a leased slab free."""
        pool = self._pool
        copy = pool.copy_of(block)
        part, own = self.parts[copy], slab.free[copy]
        own.append(block)
        part.free_blocks += 1
        free = len(own)
        part.file(first, free - 1, free)
        if pool.record_freed:
            page = block % pool.num_pages
            # Unless another copy has something in them.
            if page not in {other % pool.num_pages for other in (*slab.used, *slab.cached)}:
                pool.note_freed([block], self.layers)

    def _lease_slabs(self, copy: int, count: int, blocks: list[int], wanted: int) -> None:
        """Leases slabs and adds a copy's blocks to those given out, until there are `wanted`."""
        pool, size, layers = self._pool, self.blocks_per_slab, self.layers
        pool.changes += 1
        self.slabs += count
        for part in self.parts:
            part.free_blocks += count * size
        slabs = pool.empty[-count:]
        del pool.empty[-count:]
        for first in reversed(slabs):
            slab = pool.cut[first] = Slab(self.model)
            for at, part in enumerate(self.parts):
                begin = first + at * pool.num_pages
                pages = range(begin, begin + size * layers, layers)
                if at == copy:
                    taken = pages[: wanted - len(blocks)]
                    slab.used.update(taken)
                    blocks += taken
                    pages = pages[len(taken) :]
                slab.free.append(list(reversed(pages)))
                part.file(first, 0, len(pages))

    def _return_slab(self, first: int) -> None:
        """Ends the lease of a slab whose blocks are all free."""
        pool, size = self._pool, self.blocks_per_slab
        for part in self.parts:
            part.file(first, size, 0)
            part.free_blocks -= size
        del pool.cut[first]
        pool.changes += 1
        self.slabs -= 1
        pool.empty.append(first)

    def _end_lease(self, first: int, slab: Slab) -> None:
        """Ends the lease of a slab in which nothing but cached blocks is left."""
        pool = self._pool
        for part, own in zip(self.parts, slab.free, strict=True):
            part.file(first, len(own), 0)
            part.free_blocks -= len(own)
            if own:
                part.roomy[first] = None
        for block in slab.cached:
            del self.parts[pool.copy_of(block)].cached[block]
        self.slabs -= 1
        self.idle[first] = None
        self.idle_cached += len(slab.cached)
        pool.idle += 1
        pool.changes += 1

    def _lease_idle(self, first: int, slab: Slab) -> None:
        """Leases an idle slab, with what is cached in it."""
        pool = self._pool
        self._unfile_idle(first, slab)
        for block in slab.cached:
            self.parts[pool.copy_of(block)].cached[block] = None
        self.slabs += 1
        for part, own in zip(self.parts, slab.free, strict=True):
            part.free_blocks += len(own)
            part.file(first, 0, len(own))
        pool.changes += 1

    def _unfile_idle(self, first: int, slab: Slab) -> None:
        del self.idle[first]
        for part in self.parts:
            part.roomy.pop(first, None)
        self.idle_cached -= len(slab.cached)
        self._pool.idle -= 1

    # Tests

    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters, blocks and slabs do not agree."""
        pool, found = self._pool, Counter[str]()
        slabs = {first: slab for first, slab in pool.cut.items() if slab.model == self.model}
        assert self.blocks_per_slab * self.layers <= pool.slab_pages
        for first, slab in slabs.items():
            assert slab.used or slab.cached, f"slab {first} is leased and empty"
            assert (first in self.idle) == (not slab.used)
            self._check_blocks(first, slab)
            found["used"] += len(slab.used)
            found["slabs" if slab.used else "idle"] += 1
            found["cached" if slab.used else "idle_cached"] += len(slab.cached)
            for at, (part, own) in enumerate(zip(self.parts, slab.free, strict=True)):
                found[f"free of {at}"] += len(own) if slab.used else 0
                assert (first in part.roomy) == (not slab.used and bool(own))
                filed = [n for n, some in enumerate(part.partial) if first in some]
                assert filed == ([len(own)] if slab.used and own else [])
            for block in slab.cached:
                held = block in self.parts[pool.copy_of(block)].cached
                assert held == bool(slab.used)
        counters = {
            "used": self.used_blocks,
            "slabs": self.slabs,
            "cached": sum(len(part.cached) for part in self.parts),
            "idle": len(self.idle),
            "idle_cached": self.idle_cached,
        }
        counters |= {f"free of {at}": part.free_blocks for at, part in enumerate(self.parts)}
        off = {key: value for key, value in counters.items() if value != found[key]}
        assert not off, f"counters of {self.model} are off: {off}, {found}"
        for part in self.parts:
            for count, filed_ in enumerate(part.partial):
                assert bool(filed_) == bool(part.mask >> count & 1)
        return set(slabs)

    def _check_blocks(self, first: int, slab: Slab) -> None:
        """Each block of a slab is in use, cached or free."""
        pool = self._pool
        held = [*slab.used, *slab.cached, *(block for own in slab.free for block in own)]
        blocks = Counter(divmod(block, pool.num_pages) for block in held)
        assert blocks == {
            (copy, first + at * self.layers): 1
            for copy in range(self.replicas)
            for at in range(self.blocks_per_slab)
        }
        for copy, own in enumerate(slab.free):
            assert {pool.copy_of(block) for block in own} <= {copy}
