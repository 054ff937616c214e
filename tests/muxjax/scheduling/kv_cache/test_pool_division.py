from __future__ import annotations

import pytest

from muxjax.errors import PoolTooSmall
from muxjax.scheduling.kv_cache.pool_division import FixedPool
from tests.muxjax.scheduling.harness import Loop, request, spec


def test_a_fixed_part_cannot_be_borrowed() -> None:
    specs = [spec("a", 2, 4, 64, max_seqs=64), spec("b", 2, 4, 64, max_seqs=64)]
    loop = Loop.of(specs, 2 + 2 * 64, "static", kv_quotas=FixedPool)
    parts = dict(loop.unit.quotas.quotas)
    for number in range(40):
        loop.unit.add(request(number, "a", prompt_tokens=20, max_tokens=20))
    for _ in range(60):
        loop.turn()
        assert loop.unit.allocator.leased_slabs("a") <= parts["a"]
    assert loop.unit.models["a"].waiting
    loop.run()
    assert loop.unit.quotas.quotas == parts
    loop.assert_empty()


def test_a_pool_without_room_for_a_request_of_each_is_refused() -> None:
    specs = [spec(name, 2, 4, 64) for name in "abc"]
    with pytest.raises(PoolTooSmall, match="a part of its own for each model"):
        Loop.of(specs, 2 + 2 * 40, "static", kv_quotas=FixedPool)
