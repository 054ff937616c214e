from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.slab_size import choose_slab_pages


def test_one_model_has_slabs_of_one_block() -> None:
    allocator = SlabAllocator(23, {"a": 3})
    assert allocator.dummy_pages == 3
    assert allocator.slab_pages == 3
    assert allocator.num_slabs == 6
    assert allocator.remainder_pages == 2
    assert allocator.waste == pytest.approx(2 / 20)


def test_a_large_pool_gets_slabs_that_fit_all_models() -> None:
    assert choose_slab_pages(100_000, [30, 18, 6]) == 90
    assert SlabAllocator(100_030, {"a": 30, "b": 18, "c": 6}).waste < 0.001


def test_a_small_pool_keeps_many_slabs() -> None:
    # 90 would waste nothing inside, but leave a pool of three slabs to three models.
    assert choose_slab_pages(300, [30, 18, 6]) <= 50


def test_a_pool_of_one_slab_works() -> None:
    allocator = SlabAllocator(10, {"a": 5, "b": 2})
    assert allocator.num_slabs == 1
    assert allocator.allocate("b", 2) == [5, 7]
    assert allocator.allocate("a", 1) is None
    allocator.free("b", [7, 5])
    assert allocator.allocate("a", 1) == [5]


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="9 pages"):
        SlabAllocator(9, {"a": 5})
    with pytest.raises(ValueError, match="at least one model"):
        SlabAllocator(9, {})


def test_blocks_are_behind_the_dummy_block_and_in_order() -> None:
    allocator = SlabAllocator(3 + 12, {"a": 3, "b": 2})
    assert allocator.slab_pages == 3
    assert allocator.allocate("a", 2) == [3, 6]
    assert allocator.allocate("b", 1) == [9]
    assert allocator.leased_pages("b") == 3
    assert allocator.used_pages("b") == 2
    assert allocator.free_slabs == 1


def test_allocation_is_all_or_nothing() -> None:
    allocator = SlabAllocator(3 + 12, {"a": 3, "b": 2})
    assert allocator.allocate("a", 5) is None
    assert allocator.free_slabs == 4
    assert allocator.allocate("a", 4) is not None
    assert allocator.allocate("b", 1) is None


def test_no_blocks_are_no_lease() -> None:
    allocator = SlabAllocator(15, {"a": 3})
    assert allocator.allocate("a", 0) == []
    assert allocator.leased_slabs("a") == 0


def test_the_fullest_slab_is_used_first() -> None:
    allocator = SlabAllocator(2 + 2000, {"a": 2, "b": 1})
    per_slab = allocator.blocks_per_slab("b")
    assert per_slab == 2
    blocks = allocator.allocate("b", 3 * per_slab)
    assert blocks is not None
    by_slab = defaultdict(list)
    for block in blocks:
        by_slab[allocator.slab_of(block)].append(block)
    first, second, third = by_slab
    allocator.free("b", by_slab[first])
    allocator.free("b", by_slab[second][:1])
    assert allocator.leased_slabs("b") == 2
    assert allocator.slabs_to_lease("b", 1) == 0
    assert allocator.slabs_to_lease("b", 2) == 1
    again = allocator.allocate("b", 1)
    assert again == by_slab[second][:1]
    assert allocator.used_blocks_in(third) == per_slab


def test_freeing_twice_or_a_block_of_another_model_raises() -> None:
    allocator = SlabAllocator(3 + 12, {"a": 3, "b": 2})
    blocks = allocator.allocate("a", 1)
    assert blocks is not None
    for block in (4, 0, 12, 15, -3):
        with pytest.raises(ValueError, match=f"page {block} is not in use by a"):
            allocator.free("a", [block])
    with pytest.raises(ValueError, match="not in use by b"):
        allocator.free("b", blocks)
    allocator.free("a", blocks)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free("a", blocks)
    allocator.check_invariants()


def test_freed_pages_are_recorded_on_demand() -> None:
    allocator = SlabAllocator(15, {"a": 3, "b": 2}, record_freed=True)
    blocks = allocator.allocate("b", 2)
    assert blocks == [3, 6]
    allocator.free("b", blocks)
    assert allocator.take_freed_pages() == [3, 4, 6, 7]
    assert allocator.take_freed_pages() == []
    quiet = SlabAllocator(15, {"a": 3})
    quiet.free("a", quiet.allocate("a", 1) or [])
    assert quiet.take_freed_pages() == []


layer_counts = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    layers=layer_counts,
    extra=st.integers(0, 150),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=60),
    order=st.randoms(use_true_random=False),
)
def test_blocks_never_overlap_and_all_come_back(layers, extra, moves, order) -> None:
    models = {f"m{i}": pages for i, pages in enumerate(layers)}
    num_pages = 2 * max(layers) + extra
    allocator = SlabAllocator(num_pages, models, record_freed=True)
    held: dict[str, list[int]] = {model: [] for model in models}
    for which, count, release in moves:
        model = f"m{which % len(models)}"
        if release:
            order.shuffle(held[model])
            gone, held[model] = held[model][:count], held[model][count:]
            allocator.free(model, gone)
            freed = allocator.take_freed_pages()
            assert len(freed) == len(gone) * models[model]
        else:
            to_lease = allocator.slabs_to_lease(model, count)
            leased, free = allocator.leased_slabs(model), allocator.free_slabs
            new = allocator.allocate(model, count)
            assert (new is None) == (to_lease > free)
            if new is not None:
                assert len(new) == count
                assert allocator.leased_slabs(model) == leased + to_lease
                held[model] += new
        allocator.check_invariants()
        pages = [
            page
            for name, blocks in held.items()
            for block in blocks
            for page in range(block, block + models[name])
        ]
        assert len(pages) == len(set(pages))
        assert all(max(layers) <= page < num_pages for page in pages)
        slabs = [{allocator.slab_of(block) for block in blocks} for blocks in held.values()]
        assert sum(map(len, slabs)) == len(set().union(*slabs))
    for model, blocks in held.items():
        allocator.free(model, blocks)
    allocator.check_invariants()
    assert allocator.free_slabs == allocator.num_slabs


@settings(max_examples=150, deadline=None)
@given(
    layers=layer_counts,
    extra=st.integers(0, 120),
    moves=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["take", "take", "share", "free", "free", "room", "slab", "block"]),
            st.integers(0, 6),
        ),
        max_size=80,
    ),
    order=st.randoms(use_true_random=False),
)
def test_shared_and_cached_blocks_are_accounted_for(layers, extra, moves, order) -> None:
    """Compares the allocator with a model that counts references only."""
    models = {f"m{i}": pages for i, pages in enumerate(layers)}
    allocator = SlabAllocator(2 * max(layers) + extra, models, record_freed=True)
    held: dict[str, Counter[int]] = {model: Counter() for model in models}
    cached: dict[str, set[int]] = {model: set() for model in models}
    keep = {block for block in range(allocator.num_pages) if block % 3}
    for which, move, count in moves:
        model = f"m{which % len(models)}"
        model_references, pages = held[model], models[model]
        before = {name: dict(references) for name, references in held.items()}
        free, evicted = allocator.free_slabs, []
        if move == "take":
            for block in allocator.allocate(model, count) or ():
                assert not any(
                    block in references for references in (*held.values(), *cached.values())
                )
                model_references[block] += 1
        elif move == "share":
            known = sorted({*model_references, *cached[model]})
            blocks = order.sample(known, min(count, len(known)))
            lease = allocator.slabs_to_lease(model, 0, blocks)
            allocator.share(model, blocks)
            assert allocator.free_slabs == free - lease
            model_references.update(blocks)
            cached[model].difference_update(blocks)
        elif move == "free":
            blocks = list(model_references.elements())
            blocks = order.sample(blocks, min(count, len(blocks)))
            allocator.free(model, blocks, keep)
            model_references.subtract(blocks)
            left = {block for block in blocks if not model_references[block]}
            cached[model] |= left & keep
            evicted = [block for block in dict.fromkeys(blocks) if block in left - keep]
            held[model] = +model_references
        elif move == "slab" and allocator.idle_slabs_of(model):
            evicted = allocator.evict_slabs(model, 1)
            assert len({allocator.slab_of(block) for block in evicted}) == 1
            assert allocator.free_slabs == free
        elif move == "block" and allocator.available_blocks(model) > allocator.free_blocks(model):
            evicted = [allocator.evict_block(model)]
        elif move == "room" and allocator.lease_idle_slab(model):
            # Allocates the free blocks of that slab, as callers do.
            num_free = allocator.free_blocks(model)
            model_references.update(allocator.allocate(model, num_free) or ())
        if move in ("slab", "block"):
            assert set(evicted) <= cached[model]
            cached[model].difference_update(evicted)
        freed = [page for block in evicted for page in range(block, block + pages)]
        assert sorted(allocator.take_freed_pages()) == sorted(freed)
        allocator.check_invariants()
        for name, references in held.items():
            assert name == model or references == before[name]
            assert allocator.used_pages(name) == len(references) * models[name]
            assert allocator.cached_pages(name) == len(cached[name]) * models[name]
            assert all(allocator.references(block) == references[block] for block in references)
            assert not any(allocator.references(block) for block in cached[name])
            in_use = {allocator.slab_of(block) for block in references}
            assert allocator.leased_slabs(name) == len(in_use)
    for model, references in held.items():
        allocator.free(model, references.elements(), keep)
        assert allocator.used_pages(model) == 0
    assert allocator.free_slabs == allocator.num_slabs
    for model in models:
        while allocator.idle_slabs_of(model):
            allocator.evict_slabs(model, 1)
    assert allocator.empty_slabs == allocator.num_slabs
    allocator.check_invariants()


@given(layers=layer_counts, usable=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_slabs_hold_a_block_of_every_model(layers, usable) -> None:
    usable = max(usable, max(layers))
    assert max(layers) <= choose_slab_pages(usable, layers) <= usable


@given(layers=layer_counts, extra=st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_waste_is_the_fraction_that_blocks_cannot_use(layers, extra) -> None:
    models = {f"m{i}": pages for i, pages in enumerate(layers)}
    allocator = SlabAllocator(2 * max(layers) + extra, models)
    usable = allocator.num_pages - allocator.dummy_pages
    used = [
        allocator.num_slabs * allocator.blocks_per_slab(model) * pages
        for model, pages in models.items()
    ]
    assert allocator.waste == pytest.approx(1 - sum(used) / len(used) / usable)


def test_a_slab_has_blocks_for_every_replica() -> None:
    allocator = SlabAllocator(2 + 8, {"a": 2}, {"a": 3})
    first, second = allocator.allocate("a", 4, 0), allocator.allocate("a", 3, 2)
    assert first is not None
    assert second is not None
    assert allocator.empty_slabs == 0
    assert allocator.allocate("a", 1, 0) is None
    assert [allocator.available_blocks("a", replica) for replica in range(3)] == [0, 4, 1]
    assert {allocator.replica_of(block) for block in second} == {2}
    assert {block % 10 for block in second} < set(first)
    assert allocator.used_pages("a") == 2 * 3  # seven blocks on three copies
    allocator.free("a", first)
    allocator.check_invariants()
    assert allocator.empty_slabs == 1  # replica 2 has a block in use in each of the others
    allocator.free("a", second)
    allocator.check_invariants()
    assert allocator.empty_slabs == 4


def test_page_is_freed_when_no_replica_uses_it() -> None:
    allocator = SlabAllocator(2 + 4, {"a": 2}, {"a": 2}, record_freed=True)
    first, second = allocator.allocate("a", 1, 0), allocator.allocate("a", 1, 1)
    assert first is not None
    assert second is not None
    assert second == [first[0] + 6]
    allocator.free("a", first)
    assert allocator.take_freed_pages() == []
    allocator.free("a", second)
    assert allocator.take_freed_pages() == [first[0], first[0] + 1]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_replicas_allocate_free_and_cache_blocks(data: st.DataObject) -> None:
    replicas = {"a": data.draw(st.integers(1, 3)), "b": 1}
    allocator = SlabAllocator(3 + 24, {"a": 3, "b": 2}, replicas, record_freed=True)
    held: list[tuple[str, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            model, blocks = held.pop(data.draw(st.integers(0, len(held) - 1)))
            allocator.free(model, blocks, blocks if data.draw(st.booleans()) else ())
        else:
            model = data.draw(st.sampled_from("ab"))
            replica = data.draw(st.integers(0, replicas[model] - 1))
            count = data.draw(st.integers(1, 4))
            missing = max(0, count - allocator.free_blocks(model, replica))
            new = -(-missing // allocator.blocks_per_slab(model))
            blocks = allocator.allocate(model, count, replica) or []
            assert bool(blocks) or new > allocator.empty_slabs
            assert len(set(blocks)) == len(blocks)
            assert not set(blocks) & {b for _, others in held for b in others}
            assert all(allocator.replica_of(block) == replica for block in blocks)
            if blocks:
                held.append((model, blocks))
        allocator.check_invariants()
