"""The format of a model's parameters on the device: types, shapes and bytes.

Norms and biases are float32: they are small, and combined with float32 activations. A matrix has
the model's type, in the fastest shape for the backend (`linear`). With int8, every matrix,
including output head and embeddings, is int8, and `NAME_scales` has one float32 number per row
(`int8`). Layers may be stacked (`stacks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.models.nn import int8
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.linear import device_put_matrix, stored_shape
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks

Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["none", "int8"]
SCALES = "_scales"


def stored_params(
    config: ModelConfig, dtype: Dtype, quantization: Quantization, stacks: Stacks | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every parameter of a `Decoder`."""
    shapes = param_shapes(config) if stacks is None else stacks.shapes(config)
    stored = {}
    for name, shape in shapes.items():
        if quantization == "int8" and _is_matrix(name):
            stored[name] = jax.ShapeDtypeStruct(stored_shape(shape, jnp.int8), jnp.int8)
            stored[name + SCALES] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
            continue
        in_products = name != "embed" or config.tie_embeddings
        stored_dtype = _stored_dtype(name, dtype)
        if in_products and _is_matrix(name):
            shape = stored_shape(shape, stored_dtype)
        stored[name] = jax.ShapeDtypeStruct(shape, stored_dtype)
    return stored


def stored_bytes(config: ModelConfig, dtype: Dtype, quantization: Quantization) -> int:
    """Bytes of all parameters on the device."""
    stored = stored_params(config, dtype, quantization).values()
    return sum(int(np.prod(p.shape)) * jnp.dtype(p.dtype).itemsize for p in stored)


def put_on_device(
    config: ModelConfig,
    name: str,
    array: np.ndarray,
    dtype: Dtype,
    quantization: Quantization,
    device: jax.Device | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Puts a canonical parameter on a device in its stored format, not stacked.

    The device may use the array's memory without a copy, so the caller must not write to it later.
    Read-only arrays, which are mapped from a file, are copied.

    Yields:
      Name and array: the parameter, or with int8 its numbers and then its scales.
    """
    if quantization == "int8" and _is_matrix(name):
        numbers, scales = int8.quantize(array)
        yield name, device_put_matrix(numbers, device)
        yield name + SCALES, jax.device_put(scales, device)
        return
    typed = array.astype(_stored_dtype(name, dtype), copy=not array.flags.writeable)
    in_products = name != "embed" or config.tie_embeddings
    put = device_put_matrix if in_products and _is_matrix(name) else jax.device_put
    yield name, put(typed, device)


def _is_matrix(name: str) -> bool:
    return not name.endswith(("norm", "bias"))


def _stored_dtype(name: str, dtype: Dtype) -> jnp.dtype:
    return jnp.dtype(dtype if _is_matrix(name) else "float32")
