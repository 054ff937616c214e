"""Blocks of pages from slabs that belong to one model at a time.

Models with `L` layers take blocks of `L` consecutive pages. Cutting one pool into blocks of unlike
size would fragment it, so the pool is first cut into slabs of equal size, a slab is leased to one
model, cut into that model's blocks, and returns to the pool when its last block is freed (slab
allocation after Bonwick, USENIX Summer 1994; the leased unit is what quotas count).

    | dummy block | slab 0 | slab 1 | ... | slab n-1 | remainder (wasted, < a slab) |

Invariants, which `check_invariants` tests:
- a page belongs to at most one block that is in use; no block reaches outside its slab;
- all blocks in use of a slab belong to the model that leases it; a slab without any is not leased;
- the first `max L` pages, where padded writes go, are never handed out;
- leased slabs and free slabs together are all slabs, and the counters agree with the slabs.

Blocks come from the fullest slab that has room, so that the emptier ones drain and return.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_SLAB_BLOCKS = 64
"""A slab is at most this many of the largest blocks: beyond that the waste no longer falls."""


def choose_slab_pages(usable_pages: int, layers: Iterable[int]) -> int:
    """The slab size that is expected to waste least of a pool.

    The waste of a size is the part of a slab that is no whole block (mean over the models), the
    pages after the last slab, and half a slab for each model, since a model's last slab is half
    full on average. The last term keeps slabs of small pools small.

    Args:
      usable_pages: pages of the pool without the dummy block.
      layers: `L` of each model.
    """
    blocks = sorted(layers)
    largest = blocks[-1]
    limit = max(largest, min(usable_pages // (2 * len(blocks)), MAX_SLAB_BLOCKS * largest))
    return min(range(largest, limit + 1), key=lambda pages: _waste(pages, usable_pages, blocks))


def _waste(slab_pages: int, usable_pages: int, layers: Sequence[int]) -> float:
    tail = sum(slab_pages % pages for pages in layers) / (len(layers) * slab_pages)
    remainder = usable_pages % slab_pages
    partly_used = slab_pages * len(layers) / 2
    return tail + (remainder + partly_used) / max(1, usable_pages)


@dataclass(slots=True)
class _Slab:
    """One slab: who leases it, and which of its blocks are free."""

    first_page: int
    model: str | None = None
    free: list[int] = field(default_factory=list)
    used: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Lease:
    """What one model holds. `partial[n]`: its slabs with `n` free blocks; `mask`: which are any."""

    layers: int
    blocks_per_slab: int
    partial: list[dict[int, None]]
    mask: int = 0
    slabs: int = 0
    free_blocks: int = 0
    used_blocks: int = 0


class SlabAllocator:
    """Hands out blocks of pages. Knows what is physically free; quotas are not its business.

    Args:
      num_pages: pages of the pool, the dummy block included.
      layers: `L` of each model by name.
      record_freed: keep the pages that were freed for `take_freed_pages` (test mode).

    Attributes:
      lease_changes: how often some model has come to lease more or fewer slabs.

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
            _Slab(self.dummy_pages + index * self.slab_pages) for index in range(self.num_slabs)
        ]
        self._free_slabs = list(range(self.num_slabs - 1, -1, -1))
        self._leases: dict[str, _Lease] = {}
        for model, pages in layers.items():
            self.add_model(model, pages)
        self.lease_changes = 0
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
        self._leases[model] = _Lease(layers, blocks, [{} for _ in range(blocks + 1)])

    def remove_model(self, model: str) -> None:
        """Drops a model that holds nothing.

        Raises:
          ValueError: it holds blocks.
        """
        if self._leases[model].slabs:
            raise ValueError(f"{model} still holds blocks")
        del self._leases[model]

    # What there is

    @property
    def usable_pages(self) -> int:
        """Pages in slabs: what quotas divide."""
        return self.num_slabs * self.slab_pages

    @property
    def free_slabs(self) -> int:
        return len(self._free_slabs)

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
        return self._leases[model].slabs

    def leased_pages(self, model: str) -> int:
        """Pages of the slabs that the model leases."""
        return self._leases[model].slabs * self.slab_pages

    def used_pages(self, model: str) -> int:
        """Pages of the model's blocks in use."""
        lease = self._leases[model]
        return lease.used_blocks * lease.layers

    def slabs_for(self, model: str, num_blocks: int) -> int:
        """Slabs that hold this many of the model's blocks, packed."""
        return -(-num_blocks // self._leases[model].blocks_per_slab)

    def slabs_to_lease(self, model: str, num_blocks: int) -> int:
        """Slabs that the model must lease beyond its own to get this many blocks more."""
        lease = self._leases[model]
        missing = num_blocks - lease.free_blocks
        return -(-missing // lease.blocks_per_slab) if missing > 0 else 0

    def free_blocks(self, model: str) -> int:
        """Blocks that the model can get without another slab."""
        return self._leases[model].free_blocks

    # Blocks

    def allocate(self, model: str, num_blocks: int) -> list[int] | None:
        """Takes blocks for a model, all or none.

        Returns:
          The first page of each block, or None when the pool has no room for all of them.
        """
        lease = self._leases[model]
        new_slabs = self.slabs_to_lease(model, num_blocks)
        if new_slabs > len(self._free_slabs):
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
            self._move(lease, index, fullest, left)
        if new_slabs:
            self._lease_slabs(model, lease, new_slabs, blocks, num_blocks)
        lease.slabs += new_slabs
        lease.free_blocks += new_slabs * lease.blocks_per_slab
        lease.free_blocks -= num_blocks
        lease.used_blocks += num_blocks
        return blocks

    def free(self, model: str, blocks: Iterable[int]) -> None:
        """Gives blocks back.

        Raises:
          ValueError: a block that the model does not have (freed twice, or never its own).
        """
        lease = self._leases[model]
        for block in blocks:
            index = self.slab_of(block)
            slab = self._slabs[index] if 0 <= index < self.num_slabs else None
            if slab is None or slab.model != model or block not in slab.used:
                raise ValueError(f"block at page {block} is not in use by {model}: freed twice?")
            slab.used.remove(block)
            slab.free.append(block)
            lease.free_blocks += 1
            lease.used_blocks -= 1
            free = len(slab.free)
            self._move(lease, index, free - 1, free)
            if free == lease.blocks_per_slab:
                self._return_slab(lease, index)
            if self._record_freed:
                self._freed.extend(range(block, block + lease.layers))

    def slab_of(self, block: int) -> int:
        """The index of the slab that a block lies in."""
        return (block - self.dummy_pages) // self.slab_pages

    def used_blocks_in(self, slab: int) -> int:
        return len(self._slabs[slab].used)

    def take_freed_pages(self) -> list[int]:
        """Pages freed since the last call, if `record_freed`; some may be in use again."""
        freed, self._freed = self._freed, []
        return freed

    def _lease_slabs(
        self, model: str, lease: _Lease, count: int, blocks: list[int], wanted: int
    ) -> None:
        """Leases slabs and adds their blocks to those given out, until there are `wanted`."""
        self.lease_changes += 1
        size, layers = lease.blocks_per_slab, lease.layers
        indices = self._free_slabs[-count:]
        del self._free_slabs[-count:]
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
                self._move(lease, index, 0, len(slab.free))

    def _return_slab(self, lease: _Lease, index: int) -> None:
        self._move(lease, index, lease.blocks_per_slab, 0)
        slab = self._slabs[index]
        slab.model = None
        slab.free = []
        self.lease_changes += 1
        lease.slabs -= 1
        lease.free_blocks -= lease.blocks_per_slab
        self._free_slabs.append(index)

    @staticmethod
    def _move(lease: _Lease, index: int, old: int, new: int) -> None:
        """Files a slab under its new number of free blocks; slabs without any are not filed."""
        if old:
            del lease.partial[old][index]
            if not lease.partial[old]:
                lease.mask &= ~(1 << old)
        if new:
            lease.partial[new][index] = None
            lease.mask |= 1 << new

    # Tests

    def check_invariants(self) -> None:
        """Raises AssertionError if an invariant of the module's docstring does not hold."""
        leased: Counter[str] = Counter()
        used: Counter[str] = Counter()
        free: Counter[str] = Counter()
        seen: set[int] = set()
        for index, slab in enumerate(self._slabs):
            if slab.model is None:
                assert not slab.used, f"slab {index} is not leased and has blocks in use"
                assert not slab.free, f"slab {index} is not leased and has blocks"
                continue
            lease = self._leases[slab.model]
            assert slab.used, f"slab {index} is leased and empty"
            assert len(slab.used) + len(slab.free) == lease.blocks_per_slab
            assert (index in lease.partial[len(slab.free)]) == bool(slab.free)
            for block in (*slab.used, *slab.free):
                pages = set(range(block, block + lease.layers))
                assert not pages & seen, f"block at page {block} overlaps another"
                assert slab.first_page <= block
                assert block + lease.layers <= slab.first_page + self.slab_pages
                seen |= pages
            leased[slab.model] += 1
            used[slab.model] += len(slab.used)
            free[slab.model] += len(slab.free)
        assert min(seen, default=self.dummy_pages) >= self.dummy_pages
        assert max(seen, default=0) < self.num_pages
        for model, lease in self._leases.items():
            assert (lease.slabs, lease.used_blocks, lease.free_blocks) == (
                leased[model],
                used[model],
                free[model],
            ), f"counters of {model} are off"
            for count, slabs in enumerate(lease.partial):
                assert bool(slabs) == bool(lease.mask >> count & 1)
                assert all(len(self._slabs[index].free) == count for index in slabs)
        assert sum(leased.values()) + len(self._free_slabs) == self.num_slabs
        assert all(self._slabs[index].model is None for index in self._free_slabs)
