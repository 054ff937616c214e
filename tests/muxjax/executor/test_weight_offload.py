"""Offload of weights to host memory, and their restore."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.executor import weight_offload


def leaves() -> list[jax.Array]:
    key = jax.random.key(0)
    dtypes = (jnp.float32, jnp.bfloat16, jnp.int8)
    return [jax.random.normal(key, (33, 65)).astype(dtype) for dtype in dtypes]


def on_device(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def test_restored_weights_are_unchanged_and_stored_once() -> None:
    weights = leaves()
    expected = [np.asarray(leaf).tobytes() for leaf in weights]
    for _ in range(3):
        offloaded = weight_offload.offload(weights, "pinned_host")
        assert {leaf.sharding.memory_kind for leaf in offloaded} == {"pinned_host"}
        assert all(leaf.is_deleted() for leaf in weights)
        weights = list(weight_offload.restore(offloaded, on_device))
        assert all(leaf.is_deleted() for leaf in offloaded)
    assert [np.asarray(leaf).tobytes() for leaf in weights] == expected
    assert {leaf.sharding.memory_kind for leaf in weights} == {"device"}


def test_weights_stay_in_place_on_a_cpu() -> None:
    assert weight_offload.offload_memory_kind(jax.devices("cpu")[0]) is None
    weights = leaves()
    assert weight_offload.offload(weights, None) == tuple(weights)
    assert weight_offload.restore(weights, on_device) == tuple(weights)
    assert not any(leaf.is_deleted() for leaf in weights)


def test_a_failed_restore_keeps_the_offloaded_weights() -> None:
    offloaded = weight_offload.offload(leaves(), "pinned_host")
    moved: list[jax.Array] = []

    def fail_at_second(leaf: jax.Array) -> jax.Array:
        if moved:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        moved.append(on_device(leaf))
        return moved[0]

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        weight_offload.restore(offloaded, fail_at_second)
    assert moved[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in offloaded)
    weight_offload.delete(offloaded)
    weight_offload.delete(offloaded)
    assert all(leaf.is_deleted() for leaf in offloaded)
