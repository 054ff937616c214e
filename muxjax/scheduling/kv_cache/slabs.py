"""State of the slabs of a pool, and the interface of a model's leases.

A slab is identified by its first page. A block is identified by its first page plus `replica *
num_pages`; see `allocator.py`.

A slab is *empty* (no block in use or cached), *leased* (a block in use) or *idle* (cached blocks,
none in use).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slab:
    """A leased or idle slab with several blocks, or with blocks of several replicas.

    Attributes:
      model: the model that holds it.
      free_by_replica: free blocks of each replica of the model.
      used: blocks with references.
      cached: blocks without references that are kept, oldest first.
    """

    model: str
    free_by_replica: list[list[int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    cached: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class ReplicaState:
    """Free and cached blocks of one replica of a model.

    Attributes:
      slabs_by_free: `slabs_by_free[n]`, for n > 0: leased slabs in which the replica has `n` free
        blocks.
      nonempty_mask: bit `n` is set if `slabs_by_free[n]` is not empty.
      free_blocks: number of free blocks in leased slabs.
      cached: cached blocks in leased slabs, oldest first.
      idle_with_free: idle slabs in which the replica has free blocks.
    """

    slabs_by_free: list[dict[int, None]]
    nonempty_mask: int = 0
    free_blocks: int = 0
    cached: dict[int, None] = field(default_factory=dict)
    idle_with_free: dict[int, None] = field(default_factory=dict)

    def move_slab(self, slab: int, old: int, new: int) -> None:
        """Moves a slab from `slabs_by_free[old]` to `slabs_by_free[new]`; 0 is not stored."""
        if old:
            del self.slabs_by_free[old][slab]
            if not self.slabs_by_free[old]:
                self.nonempty_mask &= ~(1 << old)
        if new:
            self.slabs_by_free[new][slab] = None
            self.nonempty_mask |= 1 << new


@dataclass(slots=True)
class SlabPool:
    """State that the leases of all models share.

    Attributes:
      num_pages: pages of the pool.
      slab_pages: pages of a slab.
      first_page: first page of the first slab.
      record_freed: whether freed pages are recorded in `freed_pages`.
      empty: empty slabs; the last one is leased first.
      multi_block_slabs: leased and idle slabs of `MultiBlockLease`.
      single_block_owners: lease of each block in use of a `SingleBlockLease`.
      num_idle: number of idle slabs.
      lease_version: increases whenever the number of slabs that a model leases may have changed.
      extra_references: references to each block beyond the first, if there are any.
      freed_pages: recorded pages.
    """

    num_pages: int
    slab_pages: int
    first_page: int
    record_freed: bool
    empty: list[int]
    multi_block_slabs: dict[int, Slab] = field(default_factory=dict)
    single_block_owners: dict[int, SlabLease] = field(default_factory=dict)
    num_idle: int = 0
    lease_version: int = 0
    extra_references: Counter[int] = field(default_factory=Counter)
    freed_pages: list[int] = field(default_factory=list)

    def slab_of(self, block: int) -> int:
        """The slab that contains a block."""
        page = block % self.num_pages
        return page - (page - self.first_page) % self.slab_pages

    def replica_of(self, block: int) -> int:
        """The replica of its model that a block belongs to."""
        return block // self.num_pages

    def record_freed_pages(self, blocks: Iterable[int], layers: int) -> None:
        """Records the pages of blocks of `layers` pages if `record_freed` is set."""
        if self.record_freed:
            for block in blocks:
                page = block % self.num_pages
                self.freed_pages.extend(range(page, page + layers))

    def drop_extra_reference(self, block: int) -> bool:
        """Removes one reference beyond the first; False if the block has none."""
        if block not in self.extra_references:
            return False
        self.extra_references[block] -= 1
        if not self.extra_references[block]:
            del self.extra_references[block]
        return True


class SlabLease(ABC):
    """The slabs and blocks of one model.

    Attributes:
      model: name.
      layers: pages of a block.
      num_replicas: number of replicas.
      blocks_per_slab: blocks of a slab, for each replica.
      slabs: number of leased slabs.
      used_blocks: number of blocks in use, of all replicas.
      idle: idle slabs, oldest first.
    """

    def __init__(self, pool: SlabPool, model: str, layers: int, num_replicas: int) -> None:
        self._pool = pool
        self.model = model
        self.layers = layers
        self.num_replicas = num_replicas
        self.blocks_per_slab = pool.slab_pages // layers
        self.slabs = 0
        self.used_blocks = 0
        self.idle: dict[int, None] = {}

    @property
    @abstractmethod
    def cached_blocks(self) -> int:
        """Number of cached blocks, of all replicas."""

    @abstractmethod
    def free_blocks(self, replica: int) -> int:
        """See `SlabAllocator.free_blocks`."""

    @abstractmethod
    def available_blocks(self, replica: int) -> int:
        """See `SlabAllocator.available_blocks`."""

    @abstractmethod
    def slabs_to_lease(self, num_blocks: int, shared: Iterable[int], replica: int) -> int:
        """See `SlabAllocator.slabs_to_lease`."""

    @abstractmethod
    def allocate(self, num_blocks: int, replica: int) -> list[int] | None:
        """See `SlabAllocator.allocate`."""

    @abstractmethod
    def share(self, blocks: Iterable[int]) -> None:
        """See `SlabAllocator.share`."""

    @abstractmethod
    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """See `SlabAllocator.free`."""

    @abstractmethod
    def lease_idle_slab(self, replica: int) -> bool:
        """See `SlabAllocator.lease_idle_slab`."""

    @abstractmethod
    def evict_block(self, replica: int) -> int:
        """See `SlabAllocator.evict_block`."""

    @abstractmethod
    def evict_slabs(self, count: int) -> list[int]:
        """See `SlabAllocator.evict_slabs`."""

    @abstractmethod
    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters, blocks and slabs do not agree.

        Returns:
          The leased and idle slabs of the model.
        """

    def _not_in_use(self, block: int) -> ValueError:
        return ValueError(
            f"block at page {block} is not in use by {self.model}: it was freed twice, or belongs "
            f"to another model"
        )

    def _not_held(self, block: int) -> ValueError:
        return ValueError(f"block at page {block} is neither in use nor cached by {self.model}")
