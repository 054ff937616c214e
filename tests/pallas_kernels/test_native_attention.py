"""The CPU kernel of attention with any number of query heads per KV head; see `test_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels import AttentionOptions
from muxjax.pallas_kernels.cpu import native
from tests.pallas_kernels.cases import build_case, compute_dense
from tests.pallas_kernels.harness import run

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no CPU kernels: {native.unavailable_reason()}",
)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 256])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_one_query_per_sequence(group: int, head_dim: int, kv_heads: int) -> None:
    geometry = (group * kv_heads, kv_heads, head_dim)
    lens = [1, 0, 15, 16, 17, 64, 65, 200]
    case = build_case(geometry, lens, [1] * len(lens))
    for window, softcap in [(None, None), (20, None), (64, 5.0)]:
        out = run(case, "native", decode=True, window=window, softcap=softcap)
        expected = compute_dense(case, head_dim**-0.5, window, softcap)
        valid = case.kv_lens > 0
        assert np.abs(out - expected)[valid].max() < 2e-5
        assert (out[~valid] == 0).all()


@pytest.mark.parametrize("group", [3, 9])
@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 1, 33]])
def test_bfloat16_pool_equals_its_float32_copy(group: int, queries: list[int]) -> None:
    case = build_case((2 * group, 2, 64), [200, 31, 77], queries).rounded()

    def attend(dtype: jnp.dtype) -> jax.Array:
        q, kv = jnp.asarray(case.q), jnp.asarray(case.kv, dtype)
        return native.paged_attention_native(
            q, kv, case.metadata, AttentionOptions(0.1), case.layer
        )

    np.testing.assert_array_equal(attend(jnp.dtype("bfloat16")), attend(jnp.dtype("float32")))


def test_other_pool_types_are_rejected() -> None:
    case = build_case((3, 1, 64), [5], [1])
    with pytest.raises(ValueError, match="needs a pool of float32 or bfloat16, not float16"):
        run(case, "native", dtype=jnp.float16, decode=True)
