from __future__ import annotations

from muxjax.scheduling.kv_cache.slab_size import MAX_SLAB_BLOCKS, choose_slab_pages


def test_models_of_equal_depth_have_slabs_of_one_block() -> None:
    assert choose_slab_pages(1000, [4, 4]) == 4


def test_a_large_pool_has_slabs_that_every_block_size_divides() -> None:
    assert choose_slab_pages(100_000, [30, 18, 6]) % 90 == 0


def test_the_order_of_the_models_is_irrelevant() -> None:
    assert choose_slab_pages(5000, [7, 12, 5]) == choose_slab_pages(5000, [5, 7, 12])


def test_a_slab_has_a_limited_number_of_blocks() -> None:
    layers = [97, 89, 83]
    assert choose_slab_pages(10_000_000, layers) <= MAX_SLAB_BLOCKS * max(layers)
