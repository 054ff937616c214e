"""The CPU's own products and norms and how they are made; on attention see `test_attention`."""

from __future__ import annotations

import subprocess
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

here = pytest.mark.skipif(
    native.unavailable_reason() is not None,
    reason=f"no kernels of this CPU's own: {native.unavailable_reason()}",
)
ROWS = [1, 2, 11, 12, 13, 25, 97, 300]


def quantized(outputs: int, inputs: int) -> tuple[np.ndarray, jax.Array]:
    numbers, scales = quantize(matrix(outputs, inputs))
    return numbers, jnp.asarray(scales)


def matrix(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((outputs, inputs)) / inputs**0.5).astype(np.float32)


@here
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [2, 30, 64, 130])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(rows: int, inputs: int, dtype: str) -> None:
    weight = matrix(96, inputs).astype(jnp.dtype(dtype))
    x = 8 * matrix(rows, inputs, seed=1)
    kept = device_put_matrix(weight)
    assert kept.ndim == 4
    found = np.asarray(jax.jit(linear)(jnp.asarray(x), kept))
    wanted = x.astype(weight.dtype).astype(np.float64) @ weight.astype(np.float64).T
    assert found.shape == (rows, 96)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@here
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [4, 48, 64, 192])
def test_an_int8_product_is_that_of_xla(rows: int, inputs: int) -> None:
    numbers, scales = quantized(64, inputs)
    x = jnp.asarray(matrix(rows, inputs, seed=1))
    kept = device_put_matrix(numbers)
    assert kept.ndim == 4
    found = jax.jit(linear_int8)(x, kept, scales)
    wanted = jax.jit(linear_int8)(x, jnp.asarray(numbers), scales)
    # They turn in another order, so that here and there a number is rounded the other way.
    step = (
        np.abs(np.asarray(x)).max() / 127 * np.abs(numbers * np.asarray(scales)[:, None]).max() * 8
    )
    assert np.abs(found - wanted).max() < step
    assert np.abs(found - wanted).mean() < step / 50


@here
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    numbers, scales = quantized(64, 128)
    x = jnp.asarray(matrix(40, 128, seed=1))
    for weight in (matrix(64, 128), matrix(64, 128).astype(jnp.bfloat16)):
        kept = device_put_matrix(weight)
        whole = np.asarray(linear(x, kept))
        for row in (0, 7, 39):
            np.testing.assert_array_equal(linear(x[row : row + 1], kept)[0], whole[row])
    kept = device_put_matrix(numbers)
    whole = np.asarray(linear_int8(x, kept, scales))
    np.testing.assert_array_equal(linear_int8(x[3:5], kept, scales), whole[3:5])


@here
def test_what_is_no_number_stays_in_its_row() -> None:
    numbers, scales = quantized(64, 64)
    for bad in (np.nan, np.inf):
        x = matrix(30, 64, seed=1)
        x[17, 5] = bad
        for found in (
            linear(jnp.asarray(x), device_put_matrix(matrix(64, 64))),
            linear_int8(jnp.asarray(x), device_put_matrix(numbers), scales),
        ):
            finite = np.isfinite(np.asarray(found)).all(axis=1)
            assert not finite[17]
            assert finite[np.arange(30) != 17].all()


@here
def test_rows_are_looked_up() -> None:
    at = jnp.asarray([95, 0, 33, 33])
    for dtype in ("float32", "bfloat16"):
        weight = matrix(96, 10).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(
            lookup_rows(device_put_matrix(weight), at), weight[np.asarray(at)]
        )
    numbers, scales = quantized(96, 64)
    np.testing.assert_array_equal(
        lookup_rows_int8(device_put_matrix(numbers), scales, at),
        lookup_rows_int8(jnp.asarray(numbers), scales, at),
    )


@here
def test_matrices_that_do_not_divide_are_left_as_they_are() -> None:
    assert stored_shape((96, 64), "float32") == (3, 64, 32, 1)
    assert stored_shape((96, 64), "bfloat16") == (3, 32, 32, 2)
    assert stored_shape((96, 64), "int8") == (3, 16, 32, 4)
    assert stored_shape((96, 63), "bfloat16") == (96, 63)
    assert stored_shape((90, 64), "float32") == (90, 64)
    assert stored_shape((96,), "float32") == (96,)


@here
def test_shapes_that_do_not_fit_are_refused() -> None:
    kept = device_put_matrix(matrix(64, 64))
    with pytest.raises(Exception, match="shapes that do not fit"):
        jax.block_until_ready(native.product(jnp.ones((2, 60)), kept))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    native._load.cache_clear()
    monkeypatch.delenv("MUXJAX_NATIVE", raising=False)
    yield
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.mark.usefixtures("unloaded")
def test_why_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("unloaded")
def test_a_compiler_that_fails_is_no_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no room' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "_missing_features", list)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path / "cache"))
    assert native.unavailable_reason() == f"{compiler} could not compile them: no room"
    assert not list((tmp_path / "cache").rglob("*.so"))


@here
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUXJAX_CACHE", str(tmp_path))
    compiler = next(filter(None, map(native.shutil.which, native._COMPILERS)))
    library = native._built(compiler)
    changed = library.stat().st_mtime_ns
    assert library.parent == tmp_path / "native"
    assert native._built(compiler) == library
    assert library.stat().st_mtime_ns == changed
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    # Sources that change make another library.
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in native._SOURCES.iterdir():
        (sources / path.name).write_text(path.read_text() + "\n// another\n")
    monkeypatch.setattr(native, "_SOURCES", sources)
    assert native._built(compiler) != library


def test_the_sources_are_clean() -> None:
    """No warnings of the compiler's, headers of others left out."""
    compiler = next(filter(None, map(native.shutil.which, native._COMPILERS)), None)
    if compiler is None or native._missing_features():
        pytest.skip("no compiler for them here")
    features = [f"-m{feature.replace('_', '')}" for feature in native._FEATURES]
    for path in native._SOURCES.glob("*.cc"):
        done = subprocess.run(
            [
                *(compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", *features),
                *("-isystem", jax.ffi.include_dir(), str(path)),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        ours = [line for line in done.stderr.splitlines() if line.startswith(str(path.parent))]
        assert not [line for line in ours if "warning" in line]


@here
@pytest.mark.parametrize("shape", [(1, 16), (5, 40), (3, 7, 64), (300, 576)])
def test_norms(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weight = jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)
    found = jax.jit(native.rms_norm, static_argnums=2)(x, weight, 1e-6)
    np.testing.assert_allclose(found, rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:1], native.rms_norm(x[:1], weight, 1e-6))


@here
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 4, 1, 256), (40, 9, 3, 64), (3, 2, 2, 40), (200, 3, 1, 8)])
def test_heads(sizes: tuple[int, int, int, int], normed: bool) -> None:
    tokens, num_heads, num_kv_heads, head_dim = sizes
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    qkv = normal(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angles = normal(tokens, 1, head_dim // 2)
    by = jnp.cos(angles), jnp.sin(angles)
    norms = (normal(head_dim), normal(head_dim)) if normed else None
    q, k = native.rotated_heads(
        qkv, by, norms, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=1e-6
    )
    heads = qkv.reshape(tokens, -1, head_dim)
    wanted_q, wanted_k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    if norms is not None:
        wanted_q, wanted_k = rms_norm(wanted_q, norms[0], 1e-6), rms_norm(wanted_k, norms[1], 1e-6)
    np.testing.assert_allclose(q, rotate(wanted_q, by), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(k, rotate(wanted_k, by), rtol=1e-5, atol=2e-6)


@here
def test_heads_that_do_not_fit_are_refused() -> None:
    heads = partial(native.rotated_heads, num_heads=2, num_kv_heads=1, eps=1e-6)
    by = jnp.ones((2, 1, 8)), jnp.ones((2, 1, 8))
    with pytest.raises(Exception, match="shapes that do not fit"):
        heads(jnp.ones((2, 60)), by, None)
