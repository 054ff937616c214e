"""Scores, split elements and scratch memory of the Mosaic GPU kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.gpu import core
from muxjax.pallas_kernels.gpu.tiles import choose_tiles


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_are_in_base_2(softcap):
    products = jnp.linspace(-40, 40, 21).reshape(3, 7)
    scores = np.asarray(products) * 0.3
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    powers = np.exp2(np.asarray(core.Scoring(0.3, softcap)(products)))
    np.testing.assert_allclose(powers, np.exp(scores), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 1), ("float32", 3)])
def test_split_parts_sum_to_the_input(dtype, count):
    tiles = choose_tiles(KVLayout(16, 1, 64), jnp.dtype(dtype), decode=True, device_kind="")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), dtype)
    parts = core.split_parts(x, tiles)
    assert [part.dtype for part in parts] == [tiles.part_dtype] * count
    np.testing.assert_array_equal(sum(part.astype(jnp.float32) for part in parts), x)


def test_scratch_types_match_the_buffers():
    for dtype in ("bfloat16", "float32"):
        tiles = choose_tiles(KVLayout(16, 1, 64), jnp.dtype(dtype), decode=True, device_kind="")
        buffers = core.Buffers(*core.scratch_types(tiles, jnp.dtype("float32")))
        assert (buffers.staging is None) == tiles.direct
        assert buffers.weights is None
        assert buffers.out.shape == (tiles.warpgroups, 64, 64)
