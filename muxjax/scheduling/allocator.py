"""Blocks of pages from slabs that belong to one model at a time.

Models with `L` layers take blocks of `L` consecutive pages. Cutting one pool into blocks of unlike
size would fragment it, so the pool is first cut into slabs of equal size, a slab is leased to one
model, cut into that model's blocks, and returns to the pool when its last block is freed (slab
allocation after Bonwick, USENIX Summer 1994; the leased unit is what quotas count).

    | dummy block | slab 0 | slab 1 | ... | slab n-1 | remainder (wasted, < a slab) |

A model may have several copies side by side, each on devices of its own. A page of a slab that such
a model leases is there once for each copy, and so is a block: the id of a block of copy `c` is its
first page plus `c` times the pages of the pool. What holds nothing of a copy is of no use to
another.

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
from itertools import islice
from types import MappingProxyType

from muxjax.scheduling.slab_size import choose_slab_pages
from muxjax.scheduling.slabs import Lease, Part, Slab, check_slabs


class SlabAllocator:
    """Hands out blocks of pages. Knows what is physically free; quotas are not its business.

    Args:
      num_pages: pages of the pool, the dummy block included.
      layers: `L` of each model by name.
      copies: of each model that has more than one.
      record_freed: keep the pages that were freed for `take_freed_pages` (test mode).

    Attributes:
      lease_changes: how often some model has come to lease more or fewer slabs.
      idle_slabs: slabs that hold cached blocks and nothing in use.

    Raises:
      ValueError: no models, or a pool without room for one slab.
    """

    def __init__(
        self,
        num_pages: int,
        layers: Mapping[str, int],
        copies: Mapping[str, int] = MappingProxyType({}),
        *,
        record_freed: bool = False,
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
            self.add_model(model, pages, copies.get(model, 1))
        self._extra: Counter[int] = Counter()  # references besides the first
        self.lease_changes = 0
        self.idle_slabs = 0
        self._record_freed = record_freed
        self._freed: list[int] = []

    # Models that come and go; the pool's cut into slabs stays

    def add_model(self, model: str, layers: int, copies: int = 1) -> None:
        """Takes in a model whose blocks have so many pages, and that has so many copies.

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
        parts = [Part([{} for _ in range(blocks + 1)]) for _ in range(copies)]
        self._leases[model] = Lease(layers, blocks, parts)

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
        """Blocks of a slab, for each copy of the model."""
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
        """Pages of the model's blocks in use, of a copy in the mean; a shared block counts once."""
        lease = self._leases[model]
        return -(-lease.used_blocks // len(lease.parts)) * lease.layers

    def cached_pages(self, model: str) -> int:
        """Pages of the model's cached blocks, of a copy in the mean."""
        lease = self._leases[model]
        cached = lease.idle_cached + sum([len(part.cached) for part in lease.parts])
        return -(-cached // len(lease.parts)) * lease.layers

    def slabs_for(self, model: str, num_blocks: int) -> int:
        """Slabs that hold this many blocks of one copy of the model, packed."""
        return -(-num_blocks // self._leases[model].blocks_per_slab)

    def slabs_to_lease(
        self, model: str, num_blocks: int, shared: Iterable[int] = (), copy: int = 0
    ) -> int:
        """Slabs that the model must lease beyond its own for a copy to get so many blocks more.

        Args:
          model: its name.
          num_blocks: blocks, which may take the place of cached ones.
          shared: cached or used blocks of the copy that it refers to besides.
          copy: whose blocks; a slab that is leased for one has blocks for all.
        """
        lease = self._leases[model]
        part = lease.parts[copy]
        missing = num_blocks - part.free_blocks - len(part.cached)
        idle: set[int] = set()
        for block in shared:
            index = self.slab_of(block)
            slab = self._slabs[index]
            missing += block in slab.cached
            if not slab.used:
                idle.add(index)
        missing -= len(idle) * lease.blocks_per_slab
        return len(idle) + (-(-missing // lease.blocks_per_slab) if missing > 0 else 0)

    def available_blocks(self, model: str, copy: int = 0) -> int:
        """Blocks that a copy can get without another slab, in place of cached ones too."""
        part = self._leases[model].parts[copy]
        return part.free_blocks + len(part.cached)

    def free_blocks(self, model: str, copy: int = 0) -> int:
        """Blocks that a copy can get without another slab and with nothing lost."""
        return self._leases[model].parts[copy].free_blocks

    def references(self, block: int) -> int:
        """How many refer to a block: 0 for one that is cached or free."""
        slab = self._slabs[self.slab_of(block)]
        return 1 + self._extra.get(block, 0) if block in slab.used else 0

    def slab_of(self, block: int) -> int:
        """The index of the slab that a block lies in."""
        return (block % self.num_pages - self.dummy_pages) // self.slab_pages

    def copy_of(self, block: int) -> int:
        """The copy of its model that a block is of."""
        return block // self.num_pages

    def used_blocks_in(self, slab: int) -> int:
        return len(self._slabs[slab].used)

    # Blocks

    def allocate(self, model: str, num_blocks: int, copy: int = 0) -> list[int] | None:
        """Takes blocks for a copy of a model, all or none; cached blocks stay.

        `PrefixCache.make_room` makes room first.

        Returns:
          The ids of the blocks, for the first copy their first pages; None when there is no room
          for all of them.
        """
        lease = self._leases[model]
        part = lease.parts[copy]
        missing = num_blocks - part.free_blocks
        new_slabs = -(-missing // lease.blocks_per_slab) if missing > 0 else 0
        if new_slabs > len(self._empty):
            return None
        blocks: list[int] = []
        while part.mask and len(blocks) < num_blocks:
            fullest = (part.mask & -part.mask).bit_length() - 1
            index = next(iter(part.partial[fullest]))
            slab = self._slabs[index]
            free = slab.free[copy]
            left = max(0, fullest - (num_blocks - len(blocks)))
            taken = free[left:]
            del free[left:]
            slab.used.update(taken)
            blocks += reversed(taken)
            part.file(index, fullest, left)
        if new_slabs:
            self._lease_slabs(model, copy, new_slabs, blocks, num_blocks)
        part.free_blocks -= num_blocks
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
            del slab.cached[block], lease.parts[self.copy_of(block)].cached[block]
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
                slab.cached[block] = lease.parts[self.copy_of(block)].cached[block] = None
            else:
                self._set_free(lease, index, block)
            if not slab.used:
                if slab.cached:
                    self._end_lease(lease, index)
                else:
                    self._return_slab(lease, index)

    # Cached blocks

    def lease_roomy(self, model: str, copy: int = 0) -> bool:
        """Leases an idle slab of the model with free blocks of a copy; False if there is none."""
        lease = self._leases[model]
        roomy = lease.parts[copy].roomy
        if not roomy:
            return False
        self._lease_idle(lease, next(reversed(roomy)))
        return True

    def evict_block(self, model: str, copy: int = 0) -> int:
        """Frees a copy's oldest cached block in slabs that the model leases; there must be one."""
        lease = self._leases[model]
        cached = lease.parts[copy].cached
        block = next(iter(cached))
        index = self.slab_of(block)
        del cached[block], self._slabs[index].cached[block]
        self._set_free(lease, index, block)
        return block

    def evict_slabs(self, model: str, count: int) -> list[int]:
        """Empties so many idle slabs of the model, the oldest first; returns what was cached there.

        There must be as many. Where pages are short some are emptied before each step.
        """
        lease = self._leases[model]
        indices = list(islice(lease.idle, count))
        evicted: list[int] = []
        for index in indices:
            slab = self._slabs[index]
            blocks = list(slab.cached)
            self._unfile_idle(lease, index)
            slab.model, slab.free = None, []
            slab.cached.clear()
            if self._record_freed:
                for block in blocks:
                    self._note_freed(slab, block, lease.layers)
            evicted += blocks
        self._empty += indices
        return evicted

    def take_freed_pages(self) -> list[int]:
        """Pages freed since the last call, if `record_freed`; some may be in use again."""
        freed, self._freed = self._freed, []
        return freed

    def _note_freed(self, slab: Slab, block: int, layers: int) -> None:
        """Records the pages of a freed block, unless another copy has something in them."""
        page = block % self.num_pages
        held = {other % self.num_pages for other in (*slab.used, *slab.cached)}
        if page not in held:
            self._freed.extend(range(page, page + layers))

    # Slabs

    def _find(self, model: str, block: int) -> tuple[int, Slab]:
        index = self.slab_of(block)
        slab = self._slabs[index] if 0 <= index < self.num_slabs else None
        if slab is None or slab.model != model:
            raise ValueError(f"block at page {block} is not in use by {model}: freed twice?")
        return index, slab

    def _set_free(self, lease: Lease, index: int, block: int) -> None:
        """Makes a block of a leased slab free."""
        slab, copy = self._slabs[index], self.copy_of(block)
        part, own = lease.parts[copy], slab.free[copy]
        own.append(block)
        part.free_blocks += 1
        free = len(own)
        part.file(index, free - 1, free)
        if self._record_freed:
            self._note_freed(slab, block, lease.layers)

    def _lease_slabs(
        self, model: str, copy: int, count: int, blocks: list[int], wanted: int
    ) -> None:
        """Leases slabs and adds a copy's blocks to those given out, until there are `wanted`."""
        lease = self._leases[model]
        size, layers, parts = lease.blocks_per_slab, lease.layers, lease.parts
        self.lease_changes += 1
        lease.slabs += count
        for part in parts:
            part.free_blocks += count * size
        indices = self._empty[-count:]
        del self._empty[-count:]
        for index in reversed(indices):
            slab = self._slabs[index]
            slab.model = model
            if size == len(parts) == 1:  # the usual case where all models are as deep; it counts
                slab.free = [[]]
                slab.used.add(slab.first_page)
                blocks.append(slab.first_page)
                continue
            slab.free = []
            for at, part in enumerate(parts):
                first = slab.first_page + at * self.num_pages
                pages = range(first, first + size * layers, layers)
                if at == copy:
                    taken = pages[: wanted - len(blocks)]
                    slab.used.update(taken)
                    blocks += taken
                    pages = pages[len(taken) :]
                slab.free.append(list(reversed(pages)))
                part.file(index, 0, len(pages))

    def _return_slab(self, lease: Lease, index: int) -> None:
        """Ends the lease of a slab whose blocks are all free."""
        slab, size = self._slabs[index], lease.blocks_per_slab
        for part in lease.parts:
            part.file(index, size, 0)
            part.free_blocks -= size
        slab.model = None
        slab.free = []
        self.lease_changes += 1
        lease.slabs -= 1
        self._empty.append(index)

    def _end_lease(self, lease: Lease, index: int) -> None:
        """Ends the lease of a slab in which nothing but cached blocks is left."""
        slab = self._slabs[index]
        for part, own in zip(lease.parts, slab.free, strict=True):
            part.file(index, len(own), 0)
            part.free_blocks -= len(own)
            if own:
                part.roomy[index] = None
        for block in slab.cached:
            del lease.parts[self.copy_of(block)].cached[block]
        lease.slabs -= 1
        lease.idle[index] = None
        lease.idle_cached += len(slab.cached)
        self.idle_slabs += 1
        self.lease_changes += 1

    def _lease_idle(self, lease: Lease, index: int) -> None:
        """Leases an idle slab, with what is cached in it."""
        slab = self._slabs[index]
        self._unfile_idle(lease, index)
        for block in slab.cached:
            lease.parts[self.copy_of(block)].cached[block] = None
        lease.slabs += 1
        for part, own in zip(lease.parts, slab.free, strict=True):
            part.free_blocks += len(own)
            part.file(index, 0, len(own))
        self.lease_changes += 1

    def _unfile_idle(self, lease: Lease, index: int) -> None:
        del lease.idle[index]
        for part in lease.parts:
            part.roomy.pop(index, None)
        lease.idle_cached -= len(self._slabs[index].cached)
        self.idle_slabs -= 1

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if an invariant of the module's docstring does not hold."""
        check_slabs(
            self._slabs,
            self.slab_pages,
            self.num_pages,
            self._leases,
            self._empty,
            self._extra,
        )
        assert self.idle_slabs == sum(len(lease.idle) for lease in self._leases.values())
        assert self._slabs[0].first_page == self.dummy_pages
        assert self._slabs[-1].first_page + self.slab_pages <= self.num_pages
