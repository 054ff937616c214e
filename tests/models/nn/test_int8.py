"""Products with int8 matrices, and int8 decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muxjax.models.nn.decoder import Decoder
from muxjax.models.nn.int8 import linear_int8, lookup_rows_int8, quantize
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks
from muxjax.models.nn.weight_format import put_on_device, stored_bytes, stored_params
from tests import golden

product = jax.jit(linear_int8)


def matrix(outputs: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((outputs, inputs)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("inputs", [192, 33])
@pytest.mark.parametrize("outputs", [20, 8200])
def test_product(outputs: int, inputs: int, rows: int) -> None:
    weight, x = matrix(outputs, inputs), matrix(rows, inputs)
    bias = matrix(1, outputs)[0]
    out = product(x, *quantize(weight), bias)
    assert (out.shape, out.dtype) == ((rows, outputs), jnp.float32)
    expected = x @ weight.T + bias
    assert np.abs(out - expected).mean() < 0.012 * np.abs(expected).mean()


def test_row_is_independent_of_other_rows() -> None:
    numbers, scales = quantize(matrix(40, 64))
    x = matrix(8, 64)
    together = product(x, numbers, scales)
    for row in range(8):
        np.testing.assert_allclose(
            product(x[row : row + 1], numbers, scales)[0], together[row], rtol=2e-6, atol=2e-6
        )


def test_one_row_is_padded_on_the_cpu() -> None:
    """For one row, XLA:CPU would widen the whole matrix to int32."""
    numbers, scales = quantize(matrix(40, 64))
    lowered = product.lower(matrix(1, 64), numbers, scales).as_text()
    assert "tensor<40x2xi32>" in lowered
    assert "tensor<40x1xi32>" not in lowered


def test_rotation_reduces_the_error_of_small_activations() -> None:
    weight, x = matrix(256, 512), matrix(4, 512)
    x[:, 7] *= 100
    expected = x @ weight.T
    expected_rest = expected - x[:, 7:8] * weight[:, 7]
    rotated = product(x, *quantize(weight)) - x[:, 7:8] * weight[:, 7]
    naive_step = np.abs(x).max(axis=1, keepdims=True) / 127
    naive = (np.round(x / naive_step) * naive_step) @ weight.T - x[:, 7:8] * weight[:, 7]
    error, naive_error = (np.abs(y - expected_rest).mean() for y in (rotated, naive))
    assert error < naive_error / 2


def test_zeros_and_nan() -> None:
    numbers, scales = quantize(np.zeros((4, 64), np.float32))
    assert not product(np.zeros((1, 64), np.float32), numbers, scales).any()
    x = matrix(3, 64)
    x[1, 5] = np.nan
    out = np.asarray(product(x, *quantize(matrix(4, 64))))
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_largest_sums_do_not_overflow_int32() -> None:
    """Sums are exact for inputs larger than any supported model's."""
    inputs = 32768
    weight = np.zeros((2, inputs), np.float32)
    weight[:, ::64] = 1  # after rotation and rounding, all numbers are 127
    x = weight[:1].copy()
    out = product(x, *quantize(weight))
    np.testing.assert_allclose(out, [[inputs / 64] * 2], rtol=1e-5)


def test_lookup_rows_int8() -> None:
    weight = matrix(30, 48)
    indices = np.array([29, 0, 7, 7])
    rows = lookup_rows_int8(*map(jnp.asarray, quantize(weight)), jnp.asarray(indices))
    assert np.abs(rows - weight[indices]).max() < 0.02 * np.abs(weight).max()


def test_quantizing_in_chunks_equals_quantizing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(50, 64)
    expected = quantize(weight)
    monkeypatch.setattr("muxjax.models.nn.int8._CHUNK", 64 * 7)
    for chunked, array in zip(quantize(weight), expected, strict=True):
        np.testing.assert_array_equal(chunked, array)


def int8_decoder(case: golden.Tiny, stacks: Stacks | None = None) -> Decoder:
    weights: dict[str, jax.Array] = {}
    for name, array in case.params.items():
        for part, stored in put_on_device(case.config, name, array, "float32", "int8"):
            stored_name, index = (part, None) if stacks is None else stacks.locate(part)
            if index is None or stacks is None:
                weights[stored_name] = stored
                continue
            empty = jnp.zeros((stacks.repeats, *stored.shape), stored.dtype)
            weights[stored_name] = weights.get(stored_name, empty).at[index].set(stored)
    expected = stored_params(case.config, "float32", "int8", stacks)
    assert {n: (w.shape, w.dtype) for n, w in weights.items()} == {
        n: (w.shape, w.dtype) for n, w in expected.items()
    }
    return Decoder(case.config, weights, stacks)


@pytest.mark.parametrize("name", ["llama_biases", "gemma3_softcaps", "qwen3"])
def test_logits_of_int8_decoders(name: str) -> None:
    case = golden.tiny(name)
    logits = int8_decoder(case).dense_logits(jnp.asarray([case.tokens]))[0]
    error = np.abs(np.asarray(logits) - case.logits).mean() / case.logits.std()
    assert error < 0.05


@pytest.mark.parametrize("name", ["gemma3_softcaps"])
def test_stacked_layers_equal_separate_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxjax.pallas_kernels.cpu.native.is_enabled", lambda: False)  # as on a TPU
    case = golden.tiny(name)
    tokens = jnp.asarray([case.tokens])
    separate = int8_decoder(case).dense_logits(tokens)
    stacked = int8_decoder(case, Stacks.from_config(case.config)).dense_logits(tokens)
    assert np.abs(np.asarray(separate - stacked)).mean() < 0.01 * float(separate.std())


def test_stored_bytes_equals_the_decoder_size() -> None:
    case = golden.tiny("llama_biases")
    shapes = param_shapes(case.config).values()
    small = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
    matrices = sum(shape[0] * shape[1] + 4 * shape[0] for shape in shapes if len(shape) == 2)
    assert stored_bytes(case.config, "bfloat16", "int8") == small + matrices
    weights = int8_decoder(case)
    assert sum(w.nbytes for w in jax.tree.leaves(weights)) == small + matrices


def test_weights_of_a_quantized_decoder_raise() -> None:
    decoder = int8_decoder(golden.tiny("llama"))
    with pytest.raises(ValueError, match="quantized"):
        decoder.weights()


def test_missing_scales_are_rejected() -> None:
    case = golden.tiny("llama")
    weights = {name: jnp.asarray(w) for name, w in case.params.items()}
    weights["embed"] = weights["embed"].astype(jnp.int8)
    with pytest.raises(ValueError, match="embed_scales"):
        Decoder(case.config, weights)
