import jax.numpy as jnp
import numpy as np

from muxjax.pallas_kernels.tpu.prefill import _split_queries


def test_queries_are_split_into_blocks_of_one_sequence():
    # 20 queries after 10 tokens, an empty row, 3 queries, and 5 rows of padding.
    kv_lens, starts = jnp.array([30, 0, 3]), jnp.array([0, 20, 20, 23])
    split = _split_queries(28, kv_lens, starts, 16)
    used = np.asarray(split.filled) > 0
    assert np.asarray(split.seq)[used].tolist() == [0, 0, 2]
    assert np.asarray(split.position)[used].tolist() == [10, 26, 0]
    assert np.asarray(split.filled).tolist() == [16, 4, 3, 0]
    assert np.asarray(split.is_query).tolist() == [True] * 23 + [False] * 5
    # The slot of each packed query contains its index.
    slots = np.asarray(split.slot)[:23]
    assert np.asarray(split.source).reshape(-1)[slots].tolist() == list(range(23))
