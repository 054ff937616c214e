"""The TPU decode kernel, called directly, against the NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import AttentionOptions, KVLayout
from muxjax.pallas_kernels.reference import paged_attention_reference
from muxjax.pallas_kernels.tpu.decode import MASKED, _build_constants, _next_nonempty, decode
from muxjax.pallas_kernels.tpu.head_rows import HeadRows, select_outputs, spread_queries
from muxjax.pallas_kernels.tpu.pages import TILE, PageBlock
from tests.pallas_kernels.cases import AttentionCase, build_case
from tests.pallas_kernels.interpreting import interpreted


def run_decode(case: AttentionCase, options: AttentionOptions, pages: int) -> np.ndarray:
    """The kernel's output for each query head, `[S, N, H]`."""
    num_heads = case.q.shape[1]
    heads = HeadRows.from_layout(case.layout)
    spread = spread_queries(jnp.asarray(case.q) * options.scale, heads)
    with interpreted("mosaic_tpu"):
        out = decode(
            jnp.pad(spread, ((0, 0), (0, -num_heads % TILE), (0, 0))),
            jnp.asarray(case.kv),
            jnp.asarray(case.metadata.block_tables),
            jnp.asarray(case.kv_lens),
            jnp.int32(case.layer),
            num_heads=num_heads,
            layout=case.layout,
            window=options.window,
            softcap=options.softcap,
            pages=pages,
            vmem_bytes=1 << 25,
        )
        return np.asarray(select_outputs(out[:, :num_heads], heads, case.layout))


# Heads of 80 have values that begin in the middle of a row; heads of 256 have two rows.
@pytest.mark.parametrize("geometry", [(6, 3, 64), (4, 2, 80), (2, 1, 256)])
@pytest.mark.parametrize(("pages", "window", "softcap"), [(1, None, None), (3, 20, 5.0)])
def test_decode_equals_the_reference(geometry, pages, window, softcap):
    lens = [33, 1, 70]
    case = build_case(geometry, lens, [1] * len(lens), decode=True)
    options = AttentionOptions(geometry[2] ** -0.5, window, softcap)
    expected = paged_attention_reference(case.q, case.kv, case.metadata, options, case.layer)
    np.testing.assert_allclose(run_decode(case, options, pages), expected, atol=2e-5)


def test_empty_contexts_give_zeros():
    case = build_case((6, 3, 64), [0, 20, 0], [1, 1, 1], decode=True)
    out = run_decode(case, AttentionOptions(0.125), pages=2)
    assert not out[[0, 2]].any()
    assert out[1].all()


def test_constants_locate_the_tokens_and_heads_of_a_block():
    layout = KVLayout(64, 3, 64)  # 21 tokens of 3 rows: rows 0 to 2 contain K0 K1, K2 V0, V1 V2
    block = PageBlock(layout, 2)
    head_mask, late, token = _build_constants(HeadRows.from_layout(layout), block, 6, 16)
    assert head_mask.shape == (16, block.rows)
    # Keys of KV heads 0, 1 and 2 begin in rows 0, 0 and 1, each for two query heads.
    assert (head_mask[:6] == 0).argmax(axis=1).tolist() == [0, 0, 0, 0, 1, 1]
    assert ((head_mask[:6] == 0).sum(axis=1) == 2 * 21).all()
    assert set(np.unique(head_mask).tolist()) == {np.float32(MASKED), 0.0}
    # Values are one row after the keys for head 0, and two rows for head 1.
    assert late[:6, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert token[0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert token[0, block.page_rows] == 21  # the second page's first token


def test_next_nonempty_skips_empty_contexts():
    following = jax.jit(_next_nonempty)(jnp.array([0, 5, 0, 0, 2, 0], jnp.int32))
    assert following.tolist() == [1, 4, 4, 4, 6, 6]
