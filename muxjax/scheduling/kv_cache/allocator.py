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

Blocks come from the fullest slab that has room, so that the emptier ones drain and return
(`cut_lease.py`). Slabs that hold one block, which all do where models are as deep, need less
bookkeeping (`whole_lease.py`).

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

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

from muxjax.scheduling.kv_cache.multi_block_slab import MultiBlockLease
from muxjax.scheduling.kv_cache.single_block_slab import SingleBlockLease
from muxjax.scheduling.kv_cache.slab_size import choose_slab_pages
from muxjax.scheduling.kv_cache.slabs import SlabLease, SlabPool


class SlabAllocator:
    """Hands out blocks of pages. Knows what is physically free; quotas are not its business.

    Args:
      num_pages: pages of the pool, the dummy block included.
      layers: `L` of each model by name.
      replicas: of each model that has more than one.
      record_freed: keep the pages that were freed for `take_freed_pages` (test mode).

    Raises:
      ValueError: no models, or a pool without room for one slab.
    """

    def __init__(
        self,
        num_pages: int,
        layers: Mapping[str, int],
        replicas: Mapping[str, int] = MappingProxyType({}),
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
        slabs = range(self.dummy_pages, num_pages - self.slab_pages + 1, self.slab_pages)
        self._slabs = SlabPool(
            num_pages, self.slab_pages, self.dummy_pages, record_freed, list(reversed(slabs))
        )
        self._leases: dict[str, SlabLease] = {}
        for model, pages in layers.items():
            self.add_model(model, pages, replicas.get(model, 1))

    # Models that come and go; the pool's cut into slabs stays

    def add_model(self, model: str, layers: int, replicas: int = 1) -> None:
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
        whole = replicas == 1 and self.slab_pages // layers == 1
        kind = SingleBlockLease if whole else MultiBlockLease
        self._leases[model] = kind(self._slabs, model, layers, replicas)

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
        return len(self._slabs.empty)

    @property
    def idle_slabs(self) -> int:
        """Slabs that hold cached blocks and nothing in use."""
        return self._slabs.idle

    @property
    def free_slabs(self) -> int:
        """Slabs in which nothing is in use: empty or idle."""
        slabs = self._slabs
        return len(slabs.empty) + slabs.idle

    @property
    def lease_changes(self) -> int:
        """How often some model has come to lease more or fewer slabs."""
        return self._slabs.changes

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

    def held_slabs(self) -> list[tuple[str, int, int]]:
        """The models, the slabs that hold something of each, and how many of these are idle."""
        return [
            (model, lease.slabs + len(lease.idle), len(lease.idle))
            for model, lease in self._leases.items()
        ]

    def leased_pages(self, model: str) -> int:
        """Pages of the slabs that the model leases."""
        return self._leases[model].slabs * self.slab_pages

    def used_pages(self, model: str) -> int:
        """Pages of the model's blocks in use, of a copy in the mean; a shared block counts once."""
        lease = self._leases[model]
        return -(-lease.used_blocks // lease.replicas) * lease.layers

    def cached_pages(self, model: str) -> int:
        """Pages of the model's cached blocks, of a copy in the mean."""
        lease = self._leases[model]
        return -(-lease.cached_blocks // lease.replicas) * lease.layers

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
        return self._leases[model].to_lease(num_blocks, shared, copy)

    def available_blocks(self, model: str, copy: int = 0) -> int:
        """Blocks that a copy can get without another slab, in place of cached ones too."""
        return self._leases[model].available_blocks(copy)

    def free_blocks(self, model: str, copy: int = 0) -> int:
        """Blocks that a copy can get without another slab and with nothing lost."""
        return self._leases[model].free_blocks(copy)

    def references(self, block: int) -> int:
        """How many refer to a block: 0 for one that is cached or free."""
        slabs = self._slabs
        slab = slabs.cut.get(slabs.slab_of(block))
        used = block in slabs.whole if slab is None else block in slab.used
        return 1 + slabs.extra.get(block, 0) if used else 0

    def slab_of(self, block: int) -> int:
        """The slab that a block lies in, by its first page."""
        return self._slabs.slab_of(block)

    def copy_of(self, block: int) -> int:
        """The copy of its model that a block is of."""
        return self._slabs.copy_of(block)

    def used_blocks_in(self, slab: int) -> int:
        """Blocks in use of a slab."""
        cut = self._slabs.cut.get(slab)
        return int(slab in self._slabs.whole) if cut is None else len(cut.used)

    # Blocks

    def allocate(self, model: str, num_blocks: int, copy: int = 0) -> list[int] | None:
        """Takes blocks for a copy of a model, all or none; cached blocks stay.

        `PrefixCache.make_room` makes room first.

        Returns:
          The ids of the blocks, for the first copy their first pages; None when there is no room
          for all of them.
        """
        return self._leases[model].allocate(num_blocks, copy)

    def share(self, model: str, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are in use or cached.

        Raises:
          ValueError: a block that the model does not have.
        """
        self._leases[model].share(blocks)

    def free(self, model: str, blocks: Iterable[int], keep: Container[int] = ()) -> None:
        """Gives references back; a block without any is cached if it is to be kept, else free.

        Raises:
          ValueError: a block that the model does not have in use (freed twice, or never its own).
        """
        self._leases[model].free(blocks, keep)

    def take_freed_pages(self) -> list[int]:
        """Pages freed since the last call, if `record_freed`; some may be in use again."""
        freed, self._slabs.freed = self._slabs.freed, []
        return freed

    # Cached blocks

    def lease_roomy(self, model: str, copy: int = 0) -> bool:
        """Leases an idle slab of the model with free blocks of a copy; False if there is none."""
        return self._leases[model].lease_roomy(copy)

    def evict_block(self, model: str, copy: int = 0) -> int:
        """Frees a copy's oldest cached block in slabs that the model leases; there must be one."""
        return self._leases[model].evict_block(copy)

    def evict_slabs(self, model: str, count: int) -> list[int]:
        """Empties so many idle slabs of the model, the oldest first; returns what was cached there.

        There must be as many. Where pages are short some are emptied before each step.
        """
        return self._leases[model].evict_slabs(count)

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if an invariant of the module's docstring does not hold."""
        slabs = self._slabs
        found = list(slabs.empty)
        for model, lease in self._leases.items():
            assert lease.model == model
            found += lease.check_invariants()
        everything = range(self.num_slabs)
        assert sorted(found) == [self.dummy_pages + at * self.slab_pages for at in everything]
        assert max(found) + self.slab_pages <= self.num_pages
        assert slabs.idle == sum(len(lease.idle) for lease in self._leases.values())
        assert all(count > 0 for count in slabs.extra.values())
        assert all(self.references(block) == 1 + count for block, count in slabs.extra.items())
