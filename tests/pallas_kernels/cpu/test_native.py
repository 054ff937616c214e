"""The CPU kernels for products, norms and heads, and their compilation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.models.nn.decoder import rms_norm, rotate
from muxjax.models.nn.int8 import linear_int8, lookup_rows_int8, quantize
from muxjax.models.nn.linear import device_put_matrix, linear, lookup_rows, stored_shape
from muxjax.pallas_kernels.cpu import native

needs_kernels = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no CPU kernels: {native.unavailable_reason()}",
)
ROWS = [1, 2, 11, 12, 13, 25, 97, 300]


def quantized(outputs: int, inputs: int) -> tuple[np.ndarray, jax.Array]:
    numbers, scales = quantize(matrix(outputs, inputs))
    return numbers, jnp.asarray(scales)


def matrix(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [2, 30, 64, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(rows: int, inputs: int, dtype: str) -> None:
    weight = matrix(96, inputs).astype(jnp.dtype(dtype))
    x = 8 * matrix(rows, inputs, seed=1)
    stored = device_put_matrix(weight)
    assert stored.ndim == 4
    actual = np.asarray(jax.jit(linear)(jnp.asarray(x), stored))
    expected = x.astype(weight.dtype).astype(np.float64) @ weight.astype(np.float64).T
    assert actual.shape == (rows, 96)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [4, 48, 64, 192])
def test_int8_product_equals_xla(rows: int, inputs: int) -> None:
    numbers, scales = quantized(64, inputs)
    x = jnp.asarray(matrix(rows, inputs, seed=1))
    stored = device_put_matrix(numbers)
    assert stored.ndim == 4
    actual = jax.jit(linear_int8)(x, stored, scales)
    expected = jax.jit(linear_int8)(x, jnp.asarray(numbers), scales)
    # The rotations sum in different orders, so a few numbers are rounded differently.
    step = (
        np.abs(np.asarray(x)).max() / 127 * np.abs(numbers * np.asarray(scales)[:, None]).max() * 8
    )
    assert np.abs(actual - expected).max() < step
    assert np.abs(actual - expected).mean() < step / 50


@needs_kernels
def test_row_is_independent_of_other_rows() -> None:
    numbers, scales = quantized(64, 128)
    x = jnp.asarray(matrix(40, 128, seed=1))
    for weight in (matrix(64, 128), matrix(64, 128).astype(jnp.bfloat16)):
        stored = device_put_matrix(weight)
        batch = np.asarray(linear(x, stored))
        for row in (0, 7, 39):
            np.testing.assert_array_equal(linear(x[row : row + 1], stored)[0], batch[row])
    stored = device_put_matrix(numbers)
    batch = np.asarray(linear_int8(x, stored, scales))
    np.testing.assert_array_equal(linear_int8(x[3:5], stored, scales), batch[3:5])


@needs_kernels
def test_nan_and_infinity_stay_in_their_row() -> None:
    numbers, scales = quantized(64, 64)
    for bad in (np.nan, np.inf):
        x = matrix(30, 64, seed=1)
        x[17, 5] = bad
        for actual in (
            linear(jnp.asarray(x), device_put_matrix(matrix(64, 64))),
            linear_int8(jnp.asarray(x), device_put_matrix(numbers), scales),
        ):
            finite = np.isfinite(np.asarray(actual)).all(axis=1)
            assert not finite[17]
            assert finite[np.arange(30) != 17].all()


@needs_kernels
def test_lookup_rows() -> None:
    indices = jnp.asarray([95, 0, 33, 33])
    for dtype in ("float32", "bfloat16"):
        weight = matrix(96, 10).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(
            lookup_rows(device_put_matrix(weight), indices), weight[np.asarray(indices)]
        )
    numbers, scales = quantized(96, 64)
    np.testing.assert_array_equal(
        lookup_rows_int8(device_put_matrix(numbers), scales, indices),
        lookup_rows_int8(jnp.asarray(numbers), scales, indices),
    )


@needs_kernels
def test_stored_shape_has_panels_if_sizes_are_divisible() -> None:
    assert stored_shape((96, 64), "float32") == (3, 64, 32, 1)
    assert stored_shape((96, 64), "bfloat16") == (3, 32, 32, 2)
    assert stored_shape((96, 64), "int8") == (3, 16, 32, 4)
    assert stored_shape((96, 63), "bfloat16") == (96, 63)
    assert stored_shape((90, 64), "float32") == (90, 64)
    assert stored_shape((96,), "float32") == (96,)


@needs_kernels
def test_mismatched_product_shapes_are_rejected() -> None:
    stored = device_put_matrix(matrix(64, 64))
    with pytest.raises(Exception, match="shapes do not match"):
        jax.block_until_ready(native.product(jnp.ones((2, 60)), stored))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resets the kernels to the state before they are first loaded."""
    native._load.cache_clear()
    monkeypatch.delenv("MUXJAX_NATIVE", raising=False)
    yield
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.mark.usefixtures("unloaded")
def test_unavailable_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUXJAX_NATIVE", "off")
    assert native.unavailable_reason() == "MUXJAX_NATIVE is off"
    assert not native.is_enabled()
    assert stored_shape((96, 64), "int8") == (96, 64)

    monkeypatch.delenv("MUXJAX_NATIVE")
    native._load.cache_clear()
    monkeypatch.setattr(native, "_missing_features", lambda: ["avx512f"])
    assert native.unavailable_reason() == "this processor lacks avx512f"

    native._load.cache_clear()
    monkeypatch.setattr(native, "_missing_features", list)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.unavailable_reason() == "no C++ compiler found (tried c++, g++, clang++)"


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 16), (5, 40), (3, 7, 64), (300, 576)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weight = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    actual = jax.jit(native.rms_norm, static_argnums=2)(x, weight, 1e-6)
    np.testing.assert_allclose(actual, rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual[:1], native.rms_norm(x[:1], weight, 1e-6))


@needs_kernels
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 4, 1, 256), (40, 9, 3, 64), (3, 2, 2, 40), (200, 3, 1, 8)])
def test_rotated_heads(sizes: tuple[int, int, int, int], normed: bool) -> None:
    tokens, num_heads, num_kv_heads, head_dim = sizes
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    qkv = normal(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angles = normal(tokens, 1, head_dim // 2)
    rotation = jnp.cos(angles), jnp.sin(angles)
    norms = (normal(head_dim), normal(head_dim)) if normed else None
    q, k = native.rotated_heads(
        qkv, rotation, norms, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=1e-6
    )
    heads = qkv.reshape(tokens, -1, head_dim)
    expected_q, expected_k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    if norms is not None:
        expected_q, expected_k = (
            rms_norm(expected_q, norms[0], 1e-6),
            rms_norm(expected_k, norms[1], 1e-6),
        )
    np.testing.assert_allclose(q, rotate(expected_q, rotation), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(k, rotate(expected_k, rotation), rtol=1e-5, atol=2e-6)


@needs_kernels
def test_mismatched_head_shapes_are_rejected() -> None:
    heads = partial(native.rotated_heads, num_heads=2, num_kv_heads=1, eps=1e-6)
    rotation = jnp.ones((2, 1, 8)), jnp.ones((2, 1, 8))
    with pytest.raises(Exception, match="shapes do not match"):
        heads(jnp.ones((2, 60)), rotation, None)
