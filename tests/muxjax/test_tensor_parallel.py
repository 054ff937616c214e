import json

import pytest

from tests import eight_devices
from tests.muxjax.on_eight_devices import POOL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports():
    return json.loads(eight_devices.run("tests.muxjax.on_eight_devices", "tensor_parallel"))


def test_tokens_do_not_depend_on_the_degree(reports):
    unsharded = reports[0]
    for sharded in reports[1:]:
        for name, tokens in sharded["tokens"].items():
            assert tokens == unsharded["tokens"][name], (name, sharded["tp_size"])
    for greedy, seeded in unsharded["tokens"].values():
        assert greedy != seeded
        assert len({tuple(tokens) for tokens in greedy}) == 3
        assert all(len(set(tokens)) > 3 for tokens in seeded)


def test_memory_per_device_is_divided_by_the_degree(reports):
    unsharded, *others = reports[:4]
    for sharded in others:
        tp_size = sharded["tp_size"]
        assert 0.95 * POOL / tp_size < sharded["pool_bytes"] <= POOL / tp_size
        for name, param_bytes in unsharded["param_bytes"].items():
            # Heads are padded: on eight devices, SmolLM2's 15 occupy the space of 32, and Gemma's
            # only KV head is on each device.
            assert sharded["param_bytes"][name] < 2 * param_bytes / tp_size, (name, tp_size)
    kv_heads = {
        name: [report["layouts"][name] for report in reports[:4]] for name in unsharded["layouts"]
    }
    assert kv_heads == {"smollm2": [3, 2, 1, 1], "gemma": [1, 1, 1, 1], "llama3": [8, 4, 2, 1]}


def test_an_unsharded_model_has_a_replica_on_each_device(reports):
    assert reports[4]["replicas"] == {"smollm2": 4}
    assert reports[4]["param_bytes"]["smollm2"] == reports[0]["param_bytes"]["smollm2"]
