"""Products with int8 matrices, and decoders that are made of them."""

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
def test_a_product(outputs: int, inputs: int, rows: int) -> None:
    weight, x = matrix(outputs, inputs), matrix(rows, inputs)
    bias = matrix(1, outputs)[0]
    out = product(x, *quantize(weight), bias)
    assert (out.shape, out.dtype) == ((rows, outputs), jnp.float32)
    wanted = x @ weight.T + bias
    assert np.abs(out - wanted).mean() < 0.012 * np.abs(wanted).mean()


def test_one_row_is_what_it_is_among_others() -> None:
    numbers, scales = quantize(matrix(40, 64))
    x = matrix(8, 64)
    together = product(x, numbers, scales)
    for row in range(8):
        np.testing.assert_allclose(
            product(x[row : row + 1], numbers, scales)[0], together[row], rtol=2e-6, atol=2e-6
        )


def test_one_row_is_padded_on_the_cpu() -> None:
    """XLA:CPU widens the whole matrix to int32 for one row, and takes seventeen times longer."""
    numbers, scales = quantize(matrix(40, 64))
    lowered = product.lower(matrix(1, 64), numbers, scales).as_text()
    assert "tensor<40x2xi32>" in lowered
    assert "tensor<40x1xi32>" not in lowered


def test_large_activations_do_not_drown_the_others() -> None:
    weight, x = matrix(256, 512), matrix(4, 512)
    x[:, 7] *= 100
    wanted = x @ weight.T
    wanted_without = wanted - x[:, 7:8] * weight[:, 7]
    found = product(x, *quantize(weight)) - x[:, 7:8] * weight[:, 7]
    naive_step = np.abs(x).max(axis=1, keepdims=True) / 127
    naive = (np.round(x / naive_step) * naive_step) @ weight.T - x[:, 7:8] * weight[:, 7]
    error, naive_error = (np.abs(y - wanted_without).mean() for y in (found, naive))
    assert error < naive_error / 2


def test_zeros_and_what_is_no_number() -> None:
    numbers, scales = quantize(np.zeros((4, 64), np.float32))
    assert not product(np.zeros((1, 64), np.float32), numbers, scales).any()
    x = matrix(3, 64)
    x[1, 5] = np.nan
    found = np.asarray(product(x, *quantize(matrix(4, 64))))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_a_product_is_exact_in_the_integers() -> None:
    """The largest sums of the largest models stay within int32: no value wraps round."""
    inputs = 32768
    weight = np.zeros((2, inputs), np.float32)
    weight[:, ::64] = 1  # turned, every number is the same: all are 127
    x = weight[:1].copy()
    found = product(x, *quantize(weight))
    np.testing.assert_allclose(found, [[inputs / 64] * 2], rtol=1e-5)


def test_rows_are_looked_up() -> None:
    weight = matrix(30, 48)
    at = np.array([29, 0, 7, 7])
    found = lookup_rows_int8(*map(jnp.asarray, quantize(weight)), jnp.asarray(at))
    assert np.abs(found - weight[at]).max() < 0.02 * np.abs(weight).max()


def test_quantizing_in_pieces_is_quantizing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(50, 64)
    whole = quantize(weight)
    monkeypatch.setattr("muxjax.models.nn.int8._CHUNK", 64 * 7)
    for one, other in zip(quantize(weight), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def int8_decoder(case: golden.Tiny, stacks: Stacks | None = None) -> Decoder:
    weights: dict[str, jax.Array] = {}
    for name, array in case.params.items():
        for part, found in put_on_device(case.config, name, array, "float32", "int8"):
            kept, index = (part, None) if stacks is None else stacks.locate(part)
            if index is None or stacks is None:
                weights[kept] = found
                continue
            empty = jnp.zeros((stacks.repeats, *found.shape), found.dtype)
            weights[kept] = weights.get(kept, empty).at[index].set(found)
    wanted = stored_params(case.config, "float32", "int8", stacks)
    assert {n: (w.shape, w.dtype) for n, w in weights.items()} == {
        n: (w.shape, w.dtype) for n, w in wanted.items()
    }
    return Decoder(case.config, weights, stacks)


@pytest.mark.parametrize("name", ["llama_biases", "gemma3_softcaps", "qwen3"])
def test_a_decoder_of_every_kind_of_layer(name: str) -> None:
    case = golden.tiny(name)
    logits = int8_decoder(case).dense_logits(jnp.asarray([case.tokens]))[0]
    error = np.abs(np.asarray(logits) - case.logits).mean() / case.logits.std()
    assert error < 0.05


@pytest.mark.parametrize("name", ["gemma3_softcaps"])
def test_stacked_layers_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxjax.pallas_kernels.cpu.native.is_enabled", lambda: False)  # as on a TPU
    case = golden.tiny(name)
    tokens = jnp.asarray([case.tokens])
    apart = int8_decoder(case).dense_logits(tokens)
    stacked = int8_decoder(case, Stacks.from_config(case.config)).dense_logits(tokens)
    assert np.abs(np.asarray(apart - stacked)).mean() < 0.01 * float(apart.std())


def test_bytes_are_counted_as_kept() -> None:
    case = golden.tiny("llama_biases")
    shapes = param_shapes(case.config).values()
    small = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
    matrices = sum(shape[0] * shape[1] + 4 * shape[0] for shape in shapes if len(shape) == 2)
    assert stored_bytes(case.config, "bfloat16", "int8") == small + matrices
    weights = int8_decoder(case)
    assert sum(w.nbytes for w in jax.tree.leaves(weights)) == small + matrices


def test_canonical_parameters_of_a_quantized_decoder_are_refused() -> None:
    decoder = int8_decoder(golden.tiny("llama"))
    with pytest.raises(ValueError, match="quantized"):
        decoder.weights()


def test_scales_are_asked_for() -> None:
    case = golden.tiny("llama")
    weights = {name: jnp.asarray(w) for name, w in case.params.items()}
    weights["embed"] = weights["embed"].astype(jnp.int8)
    with pytest.raises(ValueError, match="embed_scales"):
        Decoder(case.config, weights)
