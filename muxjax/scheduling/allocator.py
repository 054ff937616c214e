"""Blocks of pages from slabs that belong to one model at a time.

Models with `L` layers take blocks of `L` consecutive pages. Cutting one pool into blocks of unlike
size would fragment it, so the pool is first cut into slabs of equal size, a slab is leased to one
model, cut into that model's blocks, and returns to the pool when its last block is freed (slab
allocation after Bonwick, USENIX Summer 1994; the leased unit is what quotas count).

    | dummy block | slab 0 | slab 1 | ... | slab n-1 | remainder (wasted, < a slab) |

Blocks come from the fullest slab that has room, so that the emptier ones drain and return.

Several requests may refer to a block, and a block may be kept when nobody does: it is *cached*, to
be found again (`prefix_cache.py`), and goes as soon as its pages are wanted. So a slab in which
nothing is in use is not leased, whatever is cached in it: it is *idle*, and counts as free. What
quotas and preemption see is the same with a cache as without.

Invariants, which `check_invariants` tests:
- a page belongs to at most one block; no block reaches outside its slab;
- all blocks of a slab belong to the model that has it; a slab with nothing in it is nobody's;
- the first `max L` pages, where padded writes go, are never handed out;
- only blocks in use have references;
- leased, idle and empty slabs together are all slabs, and the counters agree with the slabs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from muxjax.scheduling.slab_size import choose_slab_pages
from muxjax.scheduling.slabs import Lease, Slab, check_slabs


class SlabAllocator:
    """Hands out blocks of pages. Knows what is physically free; quotas are not its business.

    Args:
      num_pages: pages of the pool, the dummy block included.
      layers: `L` of each model by name.
      record_freed: keep the pages that were freed for `take_freed_pages` (test mode).

    Attributes:
      lease_changes: how often some model has come to lease more or fewer slabs.
      idle_slabs: slabs that hold cached blocks and nothing in use.

    Raises:
      ValueError: no models, or a pool without room for one slab.
    """

    def __init__(
        self, num_pages: int, layers: Mapping[str, int], *, record_freed: bool = False
    ) -> None:
        if not layers:
            raise ValueError("an allocator needs at least one model")
        self.num_pages = num_pages
        self.dummy_pages = max(layers.values())
        usable = num_pages - self.dummy_pages
        if usable < self.dummy_pages:
            raise ValueError(
                f"a pool of {num_pages} pages has no room for a dummy block and one block of "
                f"{self.dummy_pages} pages each"
            )
        self.slab_pages = choose_slab_pages(usable, layers.values())
        self.num_slabs = usable // self.slab_pages
        self.remainder_pages = usable - self.num_slabs * self.slab_pages
        self._slabs = [
            Slab(self.dummy_pages + index * self.slab_pages) for index in range(self.num_slabs)
        ]
        self._empty = list(range(self.num_slabs - 1, -1, -1))
        self._leases: dict[str, Lease] = {}
        for model, pages in layers.items():
            self.add_model(model, pages)
        self._extra: Counter[int] = Counter()  # references besides the first
        self.lease_changes = 0
        self.idle_slabs = 0
        self._record_freed = record_freed
        self._freed: list[int] = []

    # Models that come and go; the pool's cut into slabs stays

    def add_model(self, model: str, layers: int) -> None:
        """Takes in a model whose blocks have so many pages.

        Raises:
          ValueError: it is there already, or its blocks do not fit the slabs as they are cut.
        """
        if model in self._leases:
            raise ValueError(f"{model} is there already")
        largest = min(self.slab_pages, self.dummy_pages)
        if layers > largest:
            raise ValueError(
                f"a block of {model} has {layers} pages, one for each layer, and the pool is cut "
                f"for models of at most {largest}"
            )
        blocks = self.slab_pages // layers
        self._leases[model] = Lease(layers, blocks, [{} for _ in range(blocks + 1)])

    def remove_model(self, model: str) -> None:
        """Drops a model that holds nothing, cached blocks included.

        Raises:
          ValueError: it holds blocks.
        """
        if self._leases[model].slabs or self._leases[model].idle:
            raise ValueError(f"{model} still holds blocks")
        del self._leases[model]

    # What there is

    @property
    def usable_pages(self) -> int:
        """Pages in slabs: what quotas divide."""
        return self.num_slabs * self.slab_pages

    @property
    def empty_slabs(self) -> int:
        """Slabs that hold nothing at all."""
        return len(self._empty)

    @property
    def free_slabs(self) -> int:
        """Slabs in which nothing is in use: empty or idle."""
        return len(self._empty) + self.idle_slabs

    @property
    def waste(self) -> float:
        """Part of the pool, dummy block apart, that no block can use (mean over the models)."""
        if not self._leases:
            return self.remainder_pages / (self.num_pages - self.dummy_pages)
        lost = sum(self.slab_pages % lease.layers for lease in self._leases.values())
        in_slabs = self.num_slabs * lost / len(self._leases)
        return (in_slabs + self.remainder_pages) / (self.num_pages - self.dummy_pages)

    def blocks_per_slab(self, model: str) -> int:
        return self._leases[model].blocks_per_slab

    def leased_slabs(self, model: str) -> int:
        """Slabs with blocks that the model has in use."""
        return self._leases[model].slabs

    def idle_slabs_of(self, model: str) -> int:
        """Slabs with cached blocks of the model and nothing in use."""
        return len(self._leases[model].idle)

    def leased_pages(self, model: str) -> int:
        """Pages of the slabs that the model leases."""
        return self._leases[model].slabs * self.slab_pages

    def used_pages(self, model: str) -> int:
        """Pages of the model's blocks in use; those of a shared block count once."""
        lease = self._leases[model]
        return lease.used_blocks * lease.layers

    def cached_pages(self, model: str) -> int:
        """Pages of the model's cached blocks."""
        lease = self._leases[model]
        return (len(lease.cached) + lease.idle_cached) * lease.layers

    def slabs_for(self, model: str, num_blocks: int) -> int:
        """Slabs that hold this many of the model's blocks, packed."""
        return -(-num_blocks // self._leases[model].blocks_per_slab)

    def slabs_to_lease(self, model: str, num_blocks: int, shared: Iterable[int] = ()) -> int:
        """Slabs that the model must lease beyond its own to get this many blocks more.

        Args:
          model: its name.
          num_blocks: blocks, which may take the place of cached ones.
          shared: cached or used blocks that it refers to besides.
        """
        lease = self._leases[model]
        missing = num_blocks - lease.free_blocks - len(lease.cached)
        idle: set[int] = set()
        for block in shared:
            index = self.slab_of(block)
            slab = self._slabs[index]
            missing += block in slab.cached
            if not slab.used:
                idle.add(index)
        missing -= len(idle) * lease.blocks_per_slab
        return len(idle) + (-(-missing // lease.blocks_per_slab) if missing > 0 else 0)

    def available_blocks(self, model: str) -> int:
        """Blocks that the model can get without another slab, in place of cached ones too."""
        lease = self._leases[model]
        return lease.free_blocks + len(lease.cached)

    def free_blocks(self, model: str) -> int:
        """Blocks that the model can get without another slab and with nothing lost."""
        return self._leases[model].free_blocks

    def references(self, block: int) -> int:
        """How many refer to a block: 0 for one that is cached or free."""
        slab = self._slabs[self.slab_of(block)]
        return 1 + self._extra.get(block, 0) if block in slab.used else 0

    def slab_of(self, block: int) -> int:
        """The index of the slab that a block lies in."""
        return (block - self.dummy_pages) // self.slab_pages

    def used_blocks_in(self, slab: int) -> int:
        return len(self._slabs[slab].used)

    # Blocks

    def allocate(self, model: str, num_blocks: int) -> list[int] | None:
        """Takes blocks for a model, all or none; cached blocks stay (`reclaim` makes room first).

        Returns:
          The first page of each block, or None when there is no room for all of them.
        """
        lease = self._leases[model]
        missing = num_blocks - lease.free_blocks
        new_slabs = -(-missing // lease.blocks_per_slab) if missing > 0 else 0
        if new_slabs > len(self._empty):
            return None
        blocks: list[int] = []
        while lease.mask and len(blocks) < num_blocks:
            fullest = (lease.mask & -lease.mask).bit_length() - 1
            index = next(iter(lease.partial[fullest]))
            slab = self._slabs[index]
            left = max(0, fullest - (num_blocks - len(blocks)))
            taken = slab.free[left:]
            del slab.free[left:]
            slab.used.update(taken)
            blocks += reversed(taken)
            lease.file(index, fullest, left)
        if new_slabs:
            self._lease_slabs(model, lease, new_slabs, blocks, num_blocks)
        lease.slabs += new_slabs
        lease.free_blocks += new_slabs * lease.blocks_per_slab
        lease.free_blocks -= num_blocks
        lease.used_blocks += num_blocks
        return blocks

    def share(self, model: str, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are in use or cached.

        Raises:
          ValueError: a block that the model does not have.
        """
        lease = self._leases[model]
        for block in blocks:
            index, slab = self._find(model, block)
            if block in slab.used:
                self._extra[block] += 1
                continue
            if block not in slab.cached:
                raise ValueError(f"block at page {block} holds nothing of {model}")
            if not slab.used:
                self._lease_idle(lease, index)
            del slab.cached[block], lease.cached[block]
            slab.used.add(block)
            lease.used_blocks += 1

    def free(self, model: str, blocks: Iterable[int], keep: Container[int] = ()) -> None:
        """Gives references back; a block without any is cached if it is to be kept, else free.

        Raises:
          ValueError: a block that the model does not have in use (freed twice, or never its own).
        """
        lease = self._leases[model]
        for block in blocks:
            index, slab = self._find(model, block)
            if block not in slab.used:
                raise ValueError(f"block at page {block} is not in use by {model}: freed twice?")
            if self._extra and block in self._extra:
                self._extra[block] -= 1
                if not self._extra[block]:
                    del self._extra[block]
                continue
            slab.used.remove(block)
            lease.used_blocks -= 1
            if block in keep:
                slab.cached[block] = lease.cached[block] = None
            else:
                self._set_free(lease, index, block)
            if not slab.used:
                if slab.cached:
                    self._end_lease(lease, index)
                else:
                    self._return_slab(lease, index)

    # Cached blocks

    def lease_roomy(self, model: str) -> bool:
        """Leases an idle slab of the model that has free blocks; False if there is none."""
        lease = self._leases[model]
        if not lease.roomy:
            return False
        self._lease_idle(lease, next(reversed(lease.roomy)))
        return True

    def evict_block(self, model: str) -> int:
        """Frees the oldest cached block in the slabs that the model leases; there must be one."""
        lease = self._leases[model]
        block = next(iter(lease.cached))
        index = self.slab_of(block)
        del lease.cached[block], self._slabs[index].cached[block]
        self._set_free(lease, index, block)
        return block

    def evict_slab(self, model: str) -> list[int]:
        """Empties the model's oldest idle slab, which there must be; returns its cached blocks."""
        lease = self._leases[model]
        index = next(iter(lease.idle))
        slab = self._slabs[index]
        blocks = list(slab.cached)
        self._unfile_idle(lease, index)
        if self._record_freed:
            for block in blocks:
                self._freed.extend(range(block, block + lease.layers))
        slab.model, slab.free = None, []
        slab.cached.clear()
        self._empty.append(index)
        return blocks

    def take_freed_pages(self) -> list[int]:
        """Pages freed since the last call, if `record_freed`; some may be in use again."""
        freed, self._freed = self._freed, []
        return freed

    # Slabs

    def _find(self, model: str, block: int) -> tuple[int, Slab]:
        index = self.slab_of(block)
        slab = self._slabs[index] if 0 <= index < self.num_slabs else None
        if slab is None or slab.model != model:
            raise ValueError(f"block at page {block} is not in use by {model}: freed twice?")
        return index, slab

    def _set_free(self, lease: Lease, index: int, block: int) -> None:
        """Makes a block of a leased slab free."""
        slab = self._slabs[index]
        slab.free.append(block)
        lease.free_blocks += 1
        free = len(slab.free)
        lease.file(index, free - 1, free)
        if self._record_freed:
            self._freed.extend(range(block, block + lease.layers))

    def _lease_slabs(
        self, model: str, lease: Lease, count: int, blocks: list[int], wanted: int
    ) -> None:
        """Leases slabs and adds their blocks to those given out, until there are `wanted`."""
        self.lease_changes += 1
        size, layers = lease.blocks_per_slab, lease.layers
        indices = self._empty[-count:]
        del self._empty[-count:]
        for index in reversed(indices):
            slab = self._slabs[index]
            slab.model = model
            first = slab.first_page
            if size == 1:  # the usual case where all models are as deep; it counts
                slab.used.add(first)
                blocks.append(first)
                continue
            pages = range(first, first + size * layers, layers)
            taken = pages[: wanted - len(blocks)]
            slab.used.update(taken)
            blocks += taken
            if len(taken) < size:
                slab.free = list(reversed(pages[len(taken) :]))
                lease.file(index, 0, len(slab.free))

    def _return_slab(self, lease: Lease, index: int) -> None:
        """Ends the lease of a slab whose blocks are all free."""
        lease.file(index, lease.blocks_per_slab, 0)
        slab = self._slabs[index]
        slab.model = None
        slab.free = []
        self.lease_changes += 1
        lease.slabs -= 1
        lease.free_blocks -= lease.blocks_per_slab
        self._empty.append(index)

    def _end_lease(self, lease: Lease, index: int) -> None:
        """Ends the lease of a slab in which nothing but cached blocks is left."""
        slab = self._slabs[index]
        lease.file(index, len(slab.free), 0)
        lease.slabs -= 1
        lease.free_blocks -= len(slab.free)
        for block in slab.cached:
            del lease.cached[block]
        lease.idle[index] = None
        if slab.free:
            lease.roomy[index] = None
        lease.idle_cached += len(slab.cached)
        self.idle_slabs += 1
        self.lease_changes += 1

    def _lease_idle(self, lease: Lease, index: int) -> None:
        """Leases an idle slab, with what is cached in it."""
        slab = self._slabs[index]
        self._unfile_idle(lease, index)
        lease.cached.update(slab.cached)
        lease.slabs += 1
        lease.free_blocks += len(slab.free)
        lease.file(index, 0, len(slab.free))
        self.lease_changes += 1

    def _unfile_idle(self, lease: Lease, index: int) -> None:
        del lease.idle[index]
        lease.roomy.pop(index, None)
        lease.idle_cached -= len(self._slabs[index].cached)
        self.idle_slabs -= 1

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if an invariant of the module's docstring does not hold."""
        check_slabs(self._slabs, self.slab_pages, self._leases, self._empty, self._extra)
        assert self.idle_slabs == sum(len(lease.idle) for lease in self._leases.values())
        assert self._slabs[0].first_page == self.dummy_pages
        assert self._slabs[-1].first_page + self.slab_pages <= self.num_pages
