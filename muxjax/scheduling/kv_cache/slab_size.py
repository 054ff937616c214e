"""How large the slabs of a pool are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

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
    return _least_waste(usable_pages, tuple(sorted(layers)))


@lru_cache(maxsize=1024)  # thousands of sizes are tried; a simulation makes the same pool often
def _least_waste(usable_pages: int, blocks: tuple[int, ...]) -> int:
    largest = blocks[-1]
    limit = max(largest, min(usable_pages // (2 * len(blocks)), MAX_SLAB_BLOCKS * largest))
    return min(range(largest, limit + 1), key=lambda pages: _waste(pages, usable_pages, blocks))


def _waste(slab_pages: int, usable_pages: int, layers: Sequence[int]) -> float:
    tail = sum(slab_pages % pages for pages in layers) / (len(layers) * slab_pages)
    remainder = usable_pages % slab_pages
    partly_used = slab_pages * len(layers) / 2
    return tail + (remainder + partly_used) / max(1, usable_pages)
