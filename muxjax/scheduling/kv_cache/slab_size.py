"""Choice of the slab size of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

MAX_SLAB_BLOCKS = 64
"""Largest slab, in blocks of the deepest model: larger slabs do not reduce the waste further."""


def choose_slab_pages(usable_pages: int, layers: Iterable[int]) -> int:
    """Chooses the slab size, in pages, with the least expected waste.

    The expected waste of a size is the sum of three parts:

    - the pages of a slab behind its last full block, as a fraction of the slab, averaged over the
      models;
    - the pages behind the last slab, as a fraction of the pool;
    - half a slab for each model, as a fraction of the pool, because the last slab of a model is
      half full on average. This part keeps the slabs of small pools small.

    Args:
      usable_pages: pages of the pool without the dummy block.
      layers: `L` of each model.
    """
    return _search_slab_pages(usable_pages, tuple(sorted(layers)))


# A search tries thousands of sizes, and a simulation builds pools of the same size many times.
@lru_cache(maxsize=1024)
def _search_slab_pages(usable_pages: int, layers: tuple[int, ...]) -> int:
    largest = layers[-1]
    limit = max(largest, min(usable_pages // (2 * len(layers)), MAX_SLAB_BLOCKS * largest))
    sizes = range(largest, limit + 1)
    return min(sizes, key=lambda pages: _expected_waste(pages, usable_pages, layers))


def _expected_waste(slab_pages: int, usable_pages: int, layers: Sequence[int]) -> float:
    tail = sum(slab_pages % pages for pages in layers) / (len(layers) * slab_pages)
    remainder = usable_pages % slab_pages
    partly_used = slab_pages * len(layers) / 2
    return tail + (remainder + partly_used) / max(1, usable_pages)
