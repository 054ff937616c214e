import jax
import numpy as np
import pytest

from muxjax.pallas_kernels import AttentionMetadata, AttentionOptions, KVLayout


def metadata(decode: bool = False) -> AttentionMetadata:
    tables, lens, starts = np.zeros((2, 3), np.int32), np.ones(2, np.int32), np.arange(3)
    return AttentionMetadata(tables, lens, starts, KVLayout(48, 3, 64), decode)


def test_metadata_is_a_pytree_with_static_layout_and_decode():
    leaves, structure = jax.tree.flatten(metadata())
    assert [leaf.shape for leaf in leaves] == [(2, 3), (2,), (3,)]
    assert structure == jax.tree.structure(metadata())
    assert structure != jax.tree.structure(metadata(decode=True))
    assert jax.tree.unflatten(structure, leaves).layout == KVLayout(48, 3, 64)


def test_function_is_traced_once_for_equal_static_fields():
    traced = []

    @jax.jit
    def count(metadata: AttentionMetadata) -> jax.Array:
        traced.append(metadata.decode)
        return metadata.kv_lens.sum()

    for decode in (False, False, True):
        assert count(metadata(decode)) == 2
    assert traced == [False, True]


def test_window_below_1_is_rejected():
    assert AttentionOptions(0.1, window=1) == AttentionOptions(0.1, 1)
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        AttentionOptions(0.1, window=0)
