"""Allocation of KV cache blocks from slabs that are leased to one model at a time.

A block of a model with `L` layers is `L` consecutive pages. Blocks of different sizes would
fragment one pool. The pool is therefore divided into slabs of equal size. A slab is leased to one
model, divided into that model's blocks, and returns to the pool when its last block is freed. The
source is slab allocation (Bonwick, USENIX Summer 1994). Quotas (MuxServe, section 3.3) count leased
slabs.

    | dummy block | slab 0 | slab 1 | ... | slab n-1 | remainder (wasted, < a slab) |

A model may have several replicas on disjoint groups of the unit's devices. Each page of a slab that
such a model leases exists once in every replica, and so does each block. The id of a block is its
first page plus `replica * num_pages`. Another replica cannot use that block.

Blocks come from the fullest slab with a free block, so that emptier slabs drain and return to the
pool (`multi_block_slab.py`). Slabs of one block need less bookkeeping (`single_block_slab.py`).

Several requests may refer to one block. A block without references may be *cached*, so that later
requests can find it (`prefix_cache.py`); it is evicted when its pages are needed. A slab with
cached blocks and none in use is not leased: it is *idle* and counts as free. Quotas and preemption
therefore decide the same with a prefix cache as without.

Invariants, which `check_invariants` tests:

- a page belongs to at most one block of a replica, and no block extends beyond its slab;
- all blocks of a slab belong to the model that holds it, and no model holds an empty slab;
- the dummy block (the first `max L` pages), where padding is written, is never allocated;
- only blocks in use have references;
- every slab is exactly one of leased, idle and empty, and the counters agree with the slabs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

from muxjax.scheduling.kv_cache.multi_block_slab import MultiBlockLease
from muxjax.scheduling.kv_cache.single_block_slab import SingleBlockLease
from muxjax.scheduling.kv_cache.slab_size import choose_slab_pages
from muxjax.scheduling.kv_cache.slabs import SlabLease, SlabPool


class SlabAllocator:
    """Allocates blocks of pages. Callers enforce the quotas.

    Args:
      num_pages: pages of the pool, including the dummy block.
      layers: `L` of each model, by name.
      replicas: number of replicas of each model that has more than one.
      record_freed: record freed pages for `take_freed_pages` (test mode).

    Raises:
      ValueError: there are no models, or the pool has no room for one slab.
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
                f"a pool of {num_pages} pages is too small: the dummy block and one block need "
                f"{self.dummy_pages} pages each"
            )
        self.slab_pages = choose_slab_pages(usable, layers.values())
        self.num_slabs = usable // self.slab_pages
        self.remainder_pages = usable - self.num_slabs * self.slab_pages
        slabs = range(self.dummy_pages, num_pages - self.slab_pages + 1, self.slab_pages)
        self._pool = SlabPool(
            num_pages, self.slab_pages, self.dummy_pages, record_freed, list(reversed(slabs))
        )
        self._leases: dict[str, SlabLease] = {}
        for model, pages in layers.items():
            self.add_model(model, pages, replicas.get(model, 1))

    # Models; the slab size stays as chosen for the first models

    def add_model(self, model: str, layers: int, replicas: int = 1) -> None:
        """Adds a model with blocks of `layers` pages.

        Raises:
          ValueError: the model is in the pool already, or its blocks are larger than the slabs or
            the dummy block.
        """
        if model in self._leases:
            raise ValueError(f"{model} is in the pool already")
        largest = min(self.slab_pages, self.dummy_pages)
        if layers > largest:
            raise ValueError(
                f"a block of {model} has {layers} pages, one for each layer, and the pool is "
                f"divided for models of at most {largest} layers"
            )
        single_block = replicas == 1 and self.slab_pages // layers == 1
        lease_type = SingleBlockLease if single_block else MultiBlockLease
        self._leases[model] = lease_type(self._pool, model, layers, replicas)

    def remove_model(self, model: str) -> None:
        """Removes a model that has no block in use or cached.

        Raises:
          ValueError: the model has blocks.
        """
        lease = self._leases[model]
        if lease.slabs or lease.idle:
            raise ValueError(
                f"{model} cannot be removed: it leases {lease.slabs} slabs and caches blocks in "
                f"{len(lease.idle)}"
            )
        del self._leases[model]

    # Counts

    @property
    def usable_pages(self) -> int:
        """Pages in slabs, which quotas divide."""
        return self.num_slabs * self.slab_pages

    @property
    def empty_slabs(self) -> int:
        """Number of slabs without a block in use or cached."""
        return len(self._pool.empty)

    @property
    def idle_slabs(self) -> int:
        """Number of slabs with cached blocks and none in use."""
        return self._pool.num_idle

    @property
    def free_slabs(self) -> int:
        """Number of slabs without a block in use: empty or idle."""
        pool = self._pool
        return len(pool.empty) + pool.num_idle

    @property
    def lease_version(self) -> int:
        """Increases whenever the number of slabs that a model leases may have changed."""
        return self._pool.lease_version

    @property
    def waste(self) -> float:
        """Fraction of the pool without the dummy block that no block can use; mean over models."""
        if not self._leases:
            return self.remainder_pages / (self.num_pages - self.dummy_pages)
        tails = sum(self.slab_pages % lease.layers for lease in self._leases.values())
        in_slabs = self.num_slabs * tails / len(self._leases)
        return (in_slabs + self.remainder_pages) / (self.num_pages - self.dummy_pages)

    def blocks_per_slab(self, model: str) -> int:
        """Blocks of a slab, for each replica of the model."""
        return self._leases[model].blocks_per_slab

    def leased_slabs(self, model: str) -> int:
        """Number of slabs in which the model has a block in use."""
        return self._leases[model].slabs

    def idle_slabs_of(self, model: str) -> int:
        """Number of slabs with cached blocks of the model and none in use."""
        return len(self._leases[model].idle)

    def held_slabs(self) -> list[tuple[str, int, int]]:
        """For each model: name, number of leased and idle slabs together, number of idle slabs."""
        return [
            (model, lease.slabs + len(lease.idle), len(lease.idle))
            for model, lease in self._leases.items()
        ]

    def leased_pages(self, model: str) -> int:
        """Pages of the slabs that the model leases, including their free blocks."""
        return self._leases[model].slabs * self.slab_pages

    def used_pages(self, model: str) -> int:
        """Pages of the model's blocks in use, mean over replicas; a shared block counts once."""
        lease = self._leases[model]
        return -(-lease.used_blocks // lease.num_replicas) * lease.layers

    def cached_pages(self, model: str) -> int:
        """Pages of the model's cached blocks, mean over replicas."""
        lease = self._leases[model]
        return -(-lease.cached_blocks // lease.num_replicas) * lease.layers

    def slabs_for(self, model: str, num_blocks: int) -> int:
        """Fewest slabs that hold this many blocks of one replica of the model."""
        return -(-num_blocks // self._leases[model].blocks_per_slab)

    def slabs_to_lease(
        self, model: str, num_blocks: int, shared: Iterable[int] = (), replica: int = 0
    ) -> int:
        """Number of slabs that the model must lease for a replica to get `num_blocks` more blocks.

        Args:
          model: name.
          num_blocks: new blocks, which may replace cached ones.
          shared: blocks of the replica, in use or cached, that get another reference as well.
          replica: the replica that needs the blocks; a leased slab has blocks for all replicas.
        """
        return self._leases[model].slabs_to_lease(num_blocks, shared, replica)

    def available_blocks(self, model: str, replica: int = 0) -> int:
        """Free and cached blocks of a replica in leased slabs."""
        return self._leases[model].available_blocks(replica)

    def free_blocks(self, model: str, replica: int = 0) -> int:
        """Free blocks of a replica in leased slabs."""
        return self._leases[model].free_blocks(replica)

    def references(self, block: int) -> int:
        """Number of references to a block; 0 if it is cached or free."""
        pool = self._pool
        slab = pool.multi_block_slabs.get(pool.slab_of(block))
        used = block in pool.single_block_owners if slab is None else block in slab.used
        return 1 + pool.extra_references.get(block, 0) if used else 0

    def slab_of(self, block: int) -> int:
        """The slab that contains a block, by its first page."""
        return self._pool.slab_of(block)

    def replica_of(self, block: int) -> int:
        """The replica of its model that a block belongs to."""
        return self._pool.replica_of(block)

    def used_blocks_in(self, slab: int) -> int:
        """Number of blocks in use in a slab, of all replicas."""
        held = self._pool.multi_block_slabs.get(slab)
        return int(slab in self._pool.single_block_owners) if held is None else len(held.used)

    # Blocks

    def allocate(self, model: str, num_blocks: int, replica: int = 0) -> list[int] | None:
        """Allocates all blocks or none, from free blocks and empty slabs.

        Cached blocks are not evicted; `PrefixCache.evict_to_fit` does that before.

        Returns:
          The ids of the blocks, or None if there is no room for all of them.
        """
        return self._leases[model].allocate(num_blocks, replica)

    def share(self, model: str, blocks: Iterable[int]) -> None:
        """Adds a reference to blocks that are in use or cached.

        Raises:
          ValueError: the model does not have a block in use or cached.
        """
        self._leases[model].share(blocks)

    def free(self, model: str, blocks: Iterable[int], keep: Container[int] = ()) -> None:
        """Drops one reference to each block.

        Args:
          model: name.
          blocks: blocks in use.
          keep: blocks that are cached instead of freed when their last reference is dropped.

        Raises:
          ValueError: a block is not in use by the model. The blocks before it are freed.
        """
        self._leases[model].free(blocks, keep)

    def take_freed_pages(self) -> list[int]:
        """Returns the pages freed since the last call; some may be allocated again (test mode)."""
        freed, self._pool.freed_pages = self._pool.freed_pages, []
        return freed

    # Cached blocks

    def lease_idle_slab(self, model: str, replica: int = 0) -> bool:
        """Leases an idle slab of the model that has free blocks of a replica, if there is one.

        Until a block of the slab is allocated or shared, it is leased without a block in use.

        Returns:
          Whether there was such a slab.
        """
        return self._leases[model].lease_idle_slab(replica)

    def evict_block(self, model: str, replica: int = 0) -> int:
        """Frees and returns the oldest cached block of a replica in the model's leased slabs.

        Requires that `available_blocks` exceeds `free_blocks`.
        """
        return self._leases[model].evict_block(replica)

    def evict_slabs(self, model: str, count: int) -> list[int]:
        """Empties the `count` oldest idle slabs of the model, which must have at least `count`.

        Returns:
          The blocks that were cached in them.
        """
        return self._leases[model].evict_slabs(count)

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if an invariant in the module's docstring does not hold."""
        pool = self._pool
        seen = list(pool.empty)
        for model, lease in self._leases.items():
            assert lease.model == model
            seen += lease.check_invariants()
        indices = range(self.num_slabs)
        assert sorted(seen) == [self.dummy_pages + index * self.slab_pages for index in indices]
        assert max(seen) + self.slab_pages <= self.num_pages
        assert pool.num_idle == sum(len(lease.idle) for lease in self._leases.values())
        extra = pool.extra_references
        assert all(count > 0 for count in extra.values())
        assert all(self.references(block) == 1 + count for block, count in extra.items())
