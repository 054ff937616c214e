import jax
import numpy as np
import pytest

from muxjax.pallas_kernels import KVLayout, write_kv
from muxjax.pallas_kernels.reference import gather_tokens


@pytest.mark.parametrize(("num_kv", "head_dim"), [(3, 64), (1, 256), (6, 48)])
def test_written_tokens_are_read_back(num_kv, head_dim):
    rng = np.random.default_rng(0)
    layout = KVLayout(50, num_kv, head_dim)
    kv = rng.standard_normal((6, 50, 128)).astype(np.float32)
    k, v = rng.standard_normal((2, 5, num_kv, head_dim)).astype(np.float32)
    slots = [(4, 0), (4, 1), (2, 3), (5, 0), (0, 0)]
    rows = np.array([p * 50 + t * layout.rows_per_token for p, t in slots], np.int32)
    out = np.asarray(jax.jit(write_kv, static_argnames="layout")(kv, k, v, rows, layout=layout))
    for index, (page, token) in enumerate(slots):
        keys, values = gather_tokens(out, np.array([page]), token + 1, 0, layout)
        np.testing.assert_array_equal(keys[token], k[index])
        np.testing.assert_array_equal(values[token], v[index])
    untouched = np.ones((300, 128), bool)
    for first in rows:
        untouched[first : first + layout.rows_per_token] = False
    np.testing.assert_array_equal(
        out.reshape(300, 128)[untouched[:, 0]], kv.reshape(300, 128)[untouched[:, 0]]
    )


def test_donated_pool_is_written_in_place():
    layout = KVLayout(96, 3, 64)
    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32)
        for shape in ((1000, 96, 128), (8, 3, 64), (8, 3, 64))
    ]
    write = jax.jit(lambda *args: write_kv(*args, layout=layout), donate_argnums=0)
    compiled = write.lower(*shapes, jax.ShapeDtypeStruct((8,), np.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6
