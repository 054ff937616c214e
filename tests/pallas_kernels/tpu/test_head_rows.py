import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import KVLayout
from muxjax.pallas_kernels.tpu.head_rows import HeadRows, select_outputs, spread_queries


@pytest.mark.parametrize(
    ("num_kv", "head_dim", "segments"),
    [(8, 128, 1), (3, 64, 1), (1, 256, 2), (6, 48, 1), (4, 80, 2), (4, 96, 2), (1, 16, 1)],
)
def test_products_with_rows_equal_products_with_heads(num_kv, head_dim, segments):
    layout = KVLayout(10**3, num_kv, head_dim)
    rows = HeadRows.from_layout(layout)
    assert rows.segments == segments
    rng = np.random.default_rng(0)
    width = layout.padded_head_dim
    token = np.zeros((2, num_kv, width), np.float32)
    token[..., :head_dim] = rng.standard_normal((2, num_kv, head_dim))
    stored = np.pad(token.reshape(-1, 128), ((0, segments), (0, 0)))  # the next token's rows
    q = rng.standard_normal((1, 2 * num_kv, head_dim)).astype(np.float32)
    spread = np.asarray(spread_queries(jnp.asarray(q), rows)).reshape(2 * num_kv, segments, 128)
    for head in range(2 * num_kv):
        kv = head // 2
        first = rows.key_rows[kv]
        score = (spread[head] * stored[first : first + segments]).sum()
        np.testing.assert_allclose(score, q[0, head] @ token[0, kv, :head_dim], rtol=1e-4)
    values = np.stack(
        [stored[r : r + segments].reshape(-1) for r in rows.value_rows for _ in range(2)]
    )
    out = select_outputs(jnp.asarray(values[None]), rows, layout)
    np.testing.assert_array_equal(out[0], np.repeat(token[1, :, :head_dim], 2, axis=0))
