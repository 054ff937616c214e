"""What the allocator remembers of slabs and of the models that lease them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slab:
    """One slab: which model has it, and what its blocks are.

    Attributes:
      first_page: where it begins.
      model: who leases it, or whose cached blocks it holds; None for an empty one.
      free: blocks of each copy of the model that hold nothing; of no copy where it is empty.
      used: blocks that a request refers to.
      cached: blocks that are kept and that nobody refers to, the oldest first.
    """

    first_page: int
    model: str | None = None
    free: list[list[int]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    cached: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class Part:
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

    def file(self, index: int, old: int, new: int) -> None:
        """Files a slab under its new number of free blocks; slabs without any are not filed."""
        if old:
            del self.partial[old][index]
            if not self.partial[old]:
                self.mask &= ~(1 << old)
        if new:
            self.partial[new][index] = None
            self.mask |= 1 << new


@dataclass(slots=True)
class Lease:
    """What one model has.

    Attributes:
      layers: pages of its blocks.
      blocks_per_slab: blocks of a slab, for each copy.
      parts: what each copy has.
      slabs: how many it leases: those with a block in use.
      used_blocks: blocks in use, of all copies.
      idle: slabs that hold cached blocks of it and nothing in use, the oldest first.
      idle_cached: cached blocks in idle slabs.
    """

    layers: int
    blocks_per_slab: int
    parts: list[Part]
    slabs: int = 0
    used_blocks: int = 0
    idle: dict[int, None] = field(default_factory=dict)
    idle_cached: int = 0


def check_slabs(
    slabs: Sequence[Slab],
    slab_pages: int,
    num_pages: int,
    leases: Mapping[str, Lease],
    empty: Sequence[int],
    extra: Mapping[int, int],
) -> None:
    """Raises AssertionError if slabs, leases and references do not agree.

    Args:
      slabs: all of a pool.
      slab_pages: pages of each.
      num_pages: pages of the pool.
      leases: by model.
      empty: slabs that nobody has.
      extra: of blocks with several references, how many there are besides the first.
    """
    found = {model: Counter[str]() for model in leases}
    used: set[int] = set()
    for index, slab in enumerate(slabs):
        if slab.model is None:
            assert not slab.used, f"slab {index} is not leased and has blocks in use"
            assert not slab.free, f"slab {index} is not leased and has blocks"
            assert not slab.cached, f"slab {index} is not leased and has cached blocks"
            continue
        lease, count = leases[slab.model], found[slab.model]
        assert slab.used or slab.cached, f"slab {index} is leased and empty"
        assert len(slab.free) == len(lease.parts)
        free = [block for own in slab.free for block in own]
        blocks = Counter(divmod(block, num_pages) for block in (*slab.used, *free, *slab.cached))
        assert blocks == {
            (copy, slab.first_page + at * lease.layers): 1
            for copy in range(len(lease.parts))
            for at in range(lease.blocks_per_slab)
        }
        assert lease.blocks_per_slab * lease.layers <= slab_pages
        assert (index in lease.idle) == (not slab.used)
        for copy, (part, own) in enumerate(zip(lease.parts, slab.free, strict=True)):
            assert all(block // num_pages == copy for block in own)
            assert (index in part.roomy) == (not slab.used and bool(own))
            filed = bool(slab.used and own)
            assert filed == any(index in slabs for slabs in part.partial)
            assert not filed or index in part.partial[len(own)]
            if slab.used:
                count[f"free of {copy}"] += len(own)
        for block in slab.cached:
            assert (block in lease.parts[block // num_pages].cached) == bool(slab.used)
        used |= slab.used
        count["used"] += len(slab.used)
        if slab.used:
            count["slabs"] += 1
            count["cached"] += len(slab.cached)
        else:
            count["idle"] += 1
            count["idle_cached"] += len(slab.cached)
    for model, lease in leases.items():
        counters = {
            "used": lease.used_blocks,
            "slabs": lease.slabs,
            "cached": sum(len(part.cached) for part in lease.parts),
            "idle": len(lease.idle),
            "idle_cached": lease.idle_cached,
        }
        counters |= {f"free of {at}": part.free_blocks for at, part in enumerate(lease.parts)}
        off = {key: value for key, value in counters.items() if value != found[model][key]}
        assert not off, f"counters of {model} are off: {off}, {found[model]}"
        for part in lease.parts:
            for count_, filed_ in enumerate(part.partial):
                assert bool(filed_) == bool(part.mask >> count_ & 1)
    held = sum(slab.model is not None for slab in slabs)
    assert held + len(empty) == len(slabs)
    assert all(slabs[index].model is None for index in empty)
    assert all(block in used and count > 0 for block, count in extra.items())
