from __future__ import annotations

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.floors import compute_floors, slabs_for_request
from muxjax.scheduling.specs import ModelSpec
from tests.muxjax.scheduling.harness import spec


def floors(*specs: ModelSpec, slabs: int) -> dict[str, int]:
    """Floors of models of one layer, so that a slab is a page and a block."""
    return compute_floors(specs, SlabAllocator(1 + slabs, {model.name: 1 for model in specs}))


def one_layer(name: str, kv_floor: float | None = None, max_model_len: int = 40) -> ModelSpec:
    """Ten pages at full length."""
    return spec(name, 1, 4, max_model_len, kv_floor=kv_floor)


def test_a_request_needs_the_slabs_of_its_blocks() -> None:
    allocator = SlabAllocator(2 + 20, {"a": 2, "b": 1})
    assert allocator.blocks_per_slab("b") == 2
    assert slabs_for_request(one_layer("b"), allocator, 8) == 1
    assert slabs_for_request(one_layer("b"), allocator, 9) == 2


def test_rounding_does_not_lose_a_slab() -> None:
    assert 0.29 * 100 < 29
    assert floors(one_layer("a", 0.29), slabs=100) == {"a": 29}


def test_default_floors_are_equal_parts_of_a_quarter() -> None:
    assert floors(one_layer("a"), one_layer("b"), slabs=40) == {"a": 5, "b": 5}


def test_default_floors_are_at_most_one_full_request() -> None:
    assert floors(one_layer("a"), one_layer("b", max_model_len=400), slabs=400) == {
        "a": 10,
        "b": 50,
    }


def test_default_floors_leave_room_for_a_full_request_of_the_others() -> None:
    # a needs 34 of 40 pages for one request: 6 are left for the floors of b and c, wanted 2 x 3.
    a, b, c = one_layer("a", max_model_len=136), one_layer("b"), one_layer("c")
    assert floors(a, b, c, slabs=40) == {"a": 3, "b": 3, "c": 3}
    assert floors(a, b, c, slabs=36) == {"a": 1, "b": 1, "c": 1}
    assert floors(a, b, c, slabs=34) == {"a": 0, "b": 0, "c": 0}


def test_given_floors_are_kept() -> None:
    assert floors(one_layer("a", 0.5), one_layer("b"), slabs=40) == {"a": 20, "b": 5}


def test_a_pool_too_small_for_one_request_is_refused_with_what_to_do() -> None:
    with pytest.raises(PoolTooSmall) as error:
        floors(one_layer("chat", max_model_len=84), one_layer("b"), slabs=20)
    assert str(error.value) == (
        "pool too small: chat needs 21 pages for one 84-token request, and 20 of 21 are available "
        "to it; raise `pool.memory` or lower its `max_model_len`"
    )


def test_floors_that_leave_no_room_for_another_model_are_refused() -> None:
    with pytest.raises(
        PoolTooSmall, match=r"a needs 10 pages .* `kv_floor` reserves 31 for other models"
    ):
        floors(one_layer("a"), one_layer("b", 0.8), slabs=39)


def test_floors_of_one_model_need_no_other() -> None:
    assert floors(one_layer("a"), slabs=10) == {"a": 2}
