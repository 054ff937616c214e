import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.models.nn.linear import device_put_matrix, linear, lookup_rows, stored_shape


@pytest.fixture(autouse=True)
def xla(monkeypatch):
    """Disables the CPU kernels, which `tests/pallas_kernels/cpu/test_native.py` tests."""
    monkeypatch.setattr("muxjax.pallas_kernels.cpu.native.is_enabled", lambda: False)


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("outputs", [20, 192])
def test_linear(outputs, rows, dtype, limit, with_bias):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 48)).astype(np.float32)
    weight = rng.standard_normal((outputs, 48)).astype(np.float32) / 7
    bias = rng.standard_normal(outputs).astype(np.float32) if with_bias else None
    out = jax.jit(linear)(x, device_put_matrix(weight.astype(dtype)), bias)
    assert out.shape == (rows, outputs)
    assert out.dtype == jnp.float32
    expected = x @ weight.T + (0 if bias is None else bias)
    assert np.abs(out - expected).max() < limit * np.abs(expected).max()


def test_stored_shape_has_tiles_if_faster():
    faster = jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12)
    assert stored_shape((192, 48), jnp.float32) == ((3, 48, 64) if faster else (192, 48))
    assert stored_shape((200, 48), jnp.float32) == (200, 48)
    assert stored_shape((192,), jnp.float32) == (192,)
    assert stored_shape((2**18, 640), jnp.float32) == (2**18, 640)


@pytest.mark.parametrize("outputs", [20, 192])
def test_lookup_rows(outputs):
    weight = np.arange(outputs * 5.0, dtype=np.float32).reshape(outputs, 5)
    indices = np.array([outputs - 1, 0, 7, 7])
    rows = lookup_rows(device_put_matrix(weight), jnp.asarray(indices))
    assert np.array_equal(rows, weight[indices])
