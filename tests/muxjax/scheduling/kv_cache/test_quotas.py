from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.allocator import SlabAllocator
from muxjax.scheduling.kv_cache.quotas import QUOTA_PERIOD, KVQuotas
from muxjax.scheduling.specs import ModelSpec
from tests.muxjax.scheduling.harness import spec


def create_quotas(
    *specs: ModelSpec, slabs: int, needs: dict[str, float] | None = None
) -> tuple[SlabAllocator, KVQuotas]:
    """Models of one layer, so that a slab is a page and a block."""
    assert all(model.num_layers == 1 for model in specs)
    allocator = SlabAllocator(1 + slabs, {model.name: 1 for model in specs})
    assert allocator.num_slabs == slabs
    return allocator, KVQuotas(
        specs, allocator, needs or dict.fromkeys([model.name for model in specs], 1.0)
    )


def one_layer(name: str, kv_floor: float | None = None, max_model_len: int = 40) -> ModelSpec:
    """Ten pages at full length."""
    return spec(name, 1, 4, max_model_len, kv_floor=kv_floor)


def test_initial_quotas_follow_needs_and_keep_floors() -> None:
    _, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40, needs={"a": 3.0, "b": 1.0})
    assert quotas.quotas == {"a": 30, "b": 10}
    _, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40, needs={"a": 99.0, "b": 1.0})
    assert quotas.quotas == {"a": 35, "b": 5}


def test_model_may_lease_free_slabs_up_to_its_quota() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    assert quotas.quotas == {"a": 20, "b": 20}
    allocator.allocate("a", 15)
    assert quotas.leasable("a") == 20  # 25 slabs are free, and 5 are for the floor of b
    allocator.allocate("b", 24)
    assert quotas.leasable("a") == 1


def test_model_above_its_quota_borrows_slabs_beyond_floors() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    allocator.allocate("a", 30)
    assert quotas.over_quota("a") == 10
    assert quotas.leasable("a") == 5
    allocator.allocate("b", 2)
    assert quotas.leasable("a") == 5
    allocator.allocate("b", 4)
    assert quotas.leasable("a") == 4
    allocator.allocate("a", 4)
    assert quotas.leasable("a") == 0
    assert quotas.over_floor("b") == 1


def test_quota_moves_from_models_that_do_not_use_it_to_models_that_are_short() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    assert not quotas.due(0.0)
    assert quotas.due(QUOTA_PERIOD)
    allocator.allocate("a", 20)
    quotas.record_lease("a")
    quotas.record_refusal("a", 1)
    quotas.move(QUOTA_PERIOD, ["a"])
    # b uses nothing: it loses half of its quota above its floor of 5, rounded up.
    assert quotas.quotas == {"a": 28, "b": 12}
    assert quotas.moves[-1].pages == 8
    assert (quotas.moves[-1].donor, quotas.moves[-1].recipient) == ("b", "a")
    assert not quotas.due(QUOTA_PERIOD + 1)


def test_quota_does_not_move_without_a_queue_or_a_refusal_at_the_quota() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    allocator.allocate("a", 20)
    quotas.move(3.0, ["a"])
    quotas.record_refusal("a", 1)
    quotas.move(6.0, [])
    quotas.record_refusal("b", 1)  # refused below its quota: pages are short, not quota
    quotas.move(9.0, ["b"])
    assert quotas.quotas == {"a": 20, "b": 20}


def test_a_short_peak_counts_as_use() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    peak = allocator.allocate("b", 18)
    quotas.record_lease("b")
    allocator.free("b", peak or [])
    allocator.allocate("a", 20)
    quotas.record_refusal("a", 1)
    quotas.move(3.0, ["a"])
    assert quotas.quotas == {"a": 20, "b": 20}


def test_when_all_are_short_quota_moves_back_to_the_expected_need() -> None:
    allocator, quotas = create_quotas(one_layer("a"), one_layer("b"), slabs=40)
    allocator.allocate("a", 20)
    quotas.record_refusal("a", 1)
    quotas.move(3.0, ["a"])
    assert quotas.quotas == {"a": 28, "b": 12}
    allocator.allocate("a", 8)
    allocator.allocate("b", 12)
    for model in ("a", "b"):
        quotas.record_lease(model)
        quotas.record_refusal(model, 1)
    quotas.move(6.0, ["a", "b"])
    assert quotas.quotas == {"a": 24, "b": 16}


@settings(max_examples=150, deadline=None)
@given(
    floors=st.lists(st.none() | st.floats(0, 0.5), min_size=1, max_size=4),
    lengths=st.lists(st.integers(4, 120), min_size=4, max_size=4),
    needs=st.lists(st.floats(0, 100), min_size=4, max_size=4),
    slabs=st.integers(2, 120),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=30),
)
def test_quotas_always_sum_to_the_pool_and_keep_floors(
    floors, lengths, needs, slabs, moves
) -> None:
    assume(sum(floor or 0 for floor in floors) <= 1)
    specs = [one_layer(f"m{i}", floor, lengths[i]) for i, floor in enumerate(floors)]
    names = [model.name for model in specs]
    try:
        allocator, quotas = create_quotas(
            *specs, slabs=slabs, needs=dict(zip(names, needs, strict=False))
        )
    except PoolTooSmall:
        return
    for model in specs:
        others = sum(floor for name, floor in quotas.floors.items() if name != model.name)
        assert model.blocks_for(model.max_model_len) + others <= slabs
    held: dict[str, list[int]] = {name: [] for name in names}
    now = 0.0
    for which, count, release in moves:
        name = names[which % len(names)]
        before = {other: quotas.leasable(other) for other in names}
        if release:
            allocator.free(name, held[name][:count])
            del held[name][:count]
        elif count <= before[name]:
            held[name] += allocator.allocate(name, count) or []
            quotas.record_lease(name)
            assert quotas.leasable(name) == before[name] - count or quotas.over_quota(name) <= 0
        else:
            quotas.record_refusal(name, count)
        for other in names:
            within = quotas.quotas[other] - allocator.leased_slabs(other)
            assert min(allocator.free_slabs, max(0, within)) <= quotas.leasable(other)
            assert quotas.leasable(other) <= allocator.free_slabs
        now += 1.0
        if quotas.due(now):
            quotas.move(now, [name])
        quotas.check_invariants()
