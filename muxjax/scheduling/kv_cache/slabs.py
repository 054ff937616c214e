"""The slabs of a pool, and what a model that leases some of them can do with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slab:
    """A slab that is cut into several blocks, or is leased by a model with several copies.

    Attributes:
      model: who has it.
      free: blocks of each copy of the model that hold nothing.
      used: blocks that a request refers to.
      cached: blocks that are kept and that nobody refers to, the oldest first.
    """

    model: str
    free: list[list[int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    cached: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class ReplicaState:
    """What one copy of a model has.

    Attributes:
      partial: `partial[n]`: the slabs that the model leases where the copy has `n` free blocks, for
        n > 0.
      mask: bit `n` says whether there are any in `partial[n]`.
      free_blocks: its free blocks in these.
      cached: its cached blocks in slabs that the model leases, the oldest first.
      roomy: idle slabs with free blocks of it.
    """

    partial: list[dict[int, None]]
    mask: int = 0
    free_blocks: int = 0
    cached: dict[int, None] = field(default_factory=dict)
    roomy: dict[int, None] = field(default_factory=dict)

    def file(self, slab: int, old: int, new: int) -> None:
        """Files a slab under its new number of free blocks; slabs without any are not filed."""
        if old:
            del self.partial[old][slab]
            if not self.partial[old]:
                self.mask &= ~(1 << old)
        if new:
            self.partial[new][slab] = None
            self.mask |= 1 << new


@dataclass(slots=True)
class SlabPool:
    """What the leases of all models share. A slab goes by its first page.

    Attributes:
      num_pages: pages of the pool.
      slab_pages: pages of a slab.
      first_page: of the first slab.
      record_freed: whether pages that were freed are kept in `freed`.
      empty: slabs that hold nothing; the last of them is leased first.
      cut: slabs of several blocks that hold something.
      whole: blocks in use that take a slab each, and whose they are.
      idle: how many slabs hold cached blocks and nothing in use.
      changes: how often some model has come to lease more or fewer slabs.
      extra: references to a block besides the first.
      freed: pages that were freed.
    """

    num_pages: int
    slab_pages: int
    first_page: int
    record_freed: bool
    empty: list[int]
    cut: dict[int, Slab] = field(default_factory=dict)
    whole: dict[int, SlabLease] = field(default_factory=dict)
    idle: int = 0
    changes: int = 0
    extra: Counter[int] = field(default_factory=Counter)
    freed: list[int] = field(default_factory=list)

    def slab_of(self, block: int) -> int:
        """The slab that a block lies in."""
        page = block % self.num_pages
        return page - (page - self.first_page) % self.slab_pages

    def copy_of(self, block: int) -> int:
        """The copy of its model that a block is of."""
        return block // self.num_pages

    def note_freed(self, blocks: Iterable[int], layers: int) -> None:
        """Records the pages of blocks of so many layers, if that is asked for."""
        if self.record_freed:
            for block in blocks:
                page = block % self.num_pages
                self.freed.extend(range(page, page + layers))

    def drop_extra(self, block: int) -> bool:
        """Takes back one reference besides the first; False if there is none."""
        if block not in self.extra:
            return False
        self.extra[block] -= 1
        if not self.extra[block]:
            del self.extra[block]
        return True


class SlabLease(ABC):
    """What one model has of the slabs.

    Attributes:
      model: its name.
      layers: pages of its blocks.
      replicas: how many there are of it.
      blocks_per_slab: blocks of a slab, for each copy.
      slabs: how many it leases: those with a block in use.
      used_blocks: blocks in use, of all copies.
      idle: slabs that hold cached blocks of it and nothing in use, the oldest first.
    """

    def __init__(self, pool: SlabPool, model: str, layers: int, replicas: int) -> None:
        self._pool = pool
        self.model = model
        self.layers = layers
        self.replicas = replicas
        self.blocks_per_slab = pool.slab_pages // layers
        self.slabs = 0
        self.used_blocks = 0
        self.idle: dict[int, None] = {}

    @property
    @abstractmethod
    def cached_blocks(self) -> int:
        """Cached blocks of all copies."""

    @abstractmethod
    def free_blocks(self, copy: int) -> int:
        """Free blocks of a copy in the slabs that are leased."""

    @abstractmethod
    def available_blocks(self, copy: int) -> int:
        """Those and the cached ones."""

    @abstractmethod
    def to_lease(self, num_blocks: int, shared: Iterable[int], copy: int) -> int:
        """See `SlabAllocator.slabs_to_lease`."""

    @abstractmethod
    def allocate(self, num_blocks: int, copy: int) -> list[int] | None:
        """See `SlabAllocator.allocate`."""

    @abstractmethod
    def share(self, blocks: Iterable[int]) -> None:
        """See `SlabAllocator.share`."""

    @abstractmethod
    def free(self, blocks: Iterable[int], keep: Container[int]) -> None:
        """See `SlabAllocator.free`."""

    @abstractmethod
    def lease_roomy(self, copy: int) -> bool:
        """See `SlabAllocator.lease_roomy`."""

    @abstractmethod
    def evict_block(self, copy: int) -> int:
        """See `SlabAllocator.evict_block`."""

    @abstractmethod
    def evict_slabs(self, count: int) -> list[int]:
        """See `SlabAllocator.evict_slabs`."""

    @abstractmethod
    def check_invariants(self) -> set[int]:
        """Raises AssertionError if counters, blocks and slabs do not agree.

        Returns:
          The slabs that hold something of the model.
        """

    def _not_in_use(self, block: int) -> ValueError:
        return ValueError(f"block at page {block} is not in use by {self.model}: freed twice?")

    def _not_there(self, block: int) -> ValueError:
        return ValueError(f"block at page {block} holds nothing of {self.model}")
