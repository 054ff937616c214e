"""The CPU's own attention beyond the suite of `test_attention`: all ways to share heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.pallas_kernels.cpu import native
from tests.pallas_kernels.cases import dense, make_case
from tests.pallas_kernels.test_attention import run

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no kernels of this CPU's own: {native.unavailable_reason()}",
)


@pytest.mark.parametrize("shared", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 256])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_one_query_a_sequence(shared: int, head_dim: int, kv_heads: int) -> None:
    geometry = (shared * kv_heads, kv_heads, head_dim)
    lens = [1, 0, 15, 16, 17, 64, 65, 200]
    case = make_case(geometry, lens, [1] * len(lens))
    for window, softcap in [(None, None), (20, None), (64, 5.0)]:
        out = run(case, "native", decode=True, window=window, softcap=softcap)
        wanted = dense(case, head_dim**-0.5, window, softcap)
        real = case.kv_lens > 0
        assert np.abs(out - wanted)[real].max() < 2e-5
        assert (out[~real] == 0).all()


@pytest.mark.parametrize("shared", [3, 9])
@pytest.mark.parametrize("queries", [[1, 1, 1], [40, 1, 33]])
def test_a_pool_of_bfloat16_is_read_as_what_it_holds(shared: int, queries: list[int]) -> None:
    case = make_case((2 * shared, 2, 64), [200, 31, 77], queries).rounded()
    q, kv, *rest = case.arrays

    def attend(kv: jax.Array) -> jax.Array:
        return native.paged_attention_native(
            jnp.asarray(q), kv, *map(jnp.asarray, rest), case.layer, layout=case.layout, scale=0.1
        )

    halves = attend(jnp.asarray(kv, jnp.bfloat16))
    np.testing.assert_array_equal(halves, attend(jnp.asarray(kv, jnp.float32)))


def test_other_pools_are_refused() -> None:
    case = make_case((3, 1, 64), [5], [1])
    with pytest.raises(ValueError, match="the pool must be of float32 or bfloat16, not float16"):
        run(case, "native", dtype=jnp.float16, decode=True)
