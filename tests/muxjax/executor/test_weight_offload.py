"""Weights that move to the host's memory and back."""

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


def test_there_and_back_are_the_same_bytes_and_one_copy() -> None:
    here = leaves()
    right = [np.asarray(leaf).tobytes() for leaf in here]
    for _ in range(3):
        there = weight_offload.offload(here, "pinned_host")
        assert {leaf.sharding.memory_kind for leaf in there} == {"pinned_host"}
        assert all(leaf.is_deleted() for leaf in here)
        here = list(weight_offload.restore(there, on_device))
        assert all(leaf.is_deleted() for leaf in there)
    assert [np.asarray(leaf).tobytes() for leaf in here] == right
    assert {leaf.sharding.memory_kind for leaf in here} == {"device"}


def test_a_cpu_has_one_memory() -> None:
    assert weight_offload.offload_memory_kind(jax.devices("cpu")[0]) is None
    here = leaves()
    assert weight_offload.offload(here, None) == tuple(here)
    assert weight_offload.restore(here, on_device) == tuple(here)
    assert not any(leaf.is_deleted() for leaf in here)


def test_a_move_that_fails_changes_nothing() -> None:
    there = weight_offload.offload(leaves(), "pinned_host")
    moved: list[jax.Array] = []

    def breaks(leaf: jax.Array) -> jax.Array:
        if moved:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        moved.append(on_device(leaf))
        return moved[0]

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        weight_offload.restore(there, breaks)
    assert moved[0].is_deleted()
    assert not any(leaf.is_deleted() for leaf in there)
    weight_offload.delete(there)
    weight_offload.delete(there)
    assert all(leaf.is_deleted() for leaf in there)
