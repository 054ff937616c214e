import json

import pytest

from tests import eight_devices
from tests.muxjax.on_eight_devices import POOL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return json.loads(eight_devices.run("tests.muxjax.on_eight_devices", "tensor_parallel"))


def test_any_degree_gives_the_same_tokens(found):
    one = found[0]
    for other in found[1:]:
        for name, tokens in other["answers"].items():
            assert tokens == one["answers"][name], (name, other["tp_size"])
    for greedy, seeded in one["answers"].values():
        assert greedy != seeded
        assert len({tuple(tokens) for tokens in greedy}) == 3
        assert all(len(set(tokens)) > 3 for tokens in seeded)


def test_what_a_device_holds_falls_with_the_degree(found):
    one, *cut = found[:4]
    for other in cut:
        tp_size = other["tp_size"]
        assert 0.95 * POOL / tp_size < other["pool_bytes"] <= POOL / tp_size
        for name, whole in one["param_bytes"].items():
            # Filled up to whole heads: SmolLM2's 15 take the room of 32 on eight devices, and
            # Gemma's only KV head is on all of them.
            assert other["param_bytes"][name] < 2 * whole / tp_size, (name, tp_size)
    kv_heads = {name: [case["layouts"][name] for case in found[:4]] for name in one["layouts"]}
    assert kv_heads == {"smollm2": [3, 2, 1, 1], "gemma": [1, 1, 1, 1], "llama3": [8, 4, 2, 1]}


def test_a_model_may_use_fewer_ways_than_its_unit_has_devices(found):
    assert found[4]["replicas"] == {"smollm2": 4}
    assert found[4]["param_bytes"]["smollm2"] == found[0]["param_bytes"]["smollm2"]
