import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.models.linear import linear


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(rows, dtype, limit, with_bias):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 48)).astype(np.float32)
    weight = rng.standard_normal((20, 48)).astype(np.float32) / 7
    bias = rng.standard_normal(20).astype(np.float32) if with_bias else None
    out = jax.jit(linear)(x, jnp.asarray(weight, dtype), bias)
    assert out.shape == (rows, 20)
    assert out.dtype == jnp.float32
    wanted = x @ weight.T + (0 if bias is None else bias)
    assert np.abs(out - wanted).max() < limit * np.abs(wanted).max()
