"""How a model's parameters are kept on the device: their types, forms and bytes.

Norms and biases stay in float32: they are small, and are added to float32 activations. A matrix has
the model's type, in the form that is fastest (`linear`); or, under int8, it is int8 with a
parameter `NAME_scales` beside it, a float32 number for each row (`int8`). All matrices are int8
then, output head and embeddings included. Layers may be stacked (`stacks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.models.nn import int8
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.linear import put_matrix, stored_shape
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.stacks import Stacks

Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["none", "int8"]
SCALES = "_scales"


def stored_params(
    config: ModelConfig, dtype: Dtype, quantization: Quantization, stacks: Stacks | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter as a `Decoder` takes it."""
    shapes = param_shapes(config) if stacks is None else stacks.shapes(config)
    kept = {}
    for name, shape in shapes.items():
        if quantization == "int8" and _is_matrix(name):
            kept[name] = jax.ShapeDtypeStruct(stored_shape(shape, jnp.int8), jnp.int8)
            kept[name + SCALES] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
            continue
        in_products = name != "embed" or config.tie_embeddings
        typed = _type(name, dtype)
        form = stored_shape(shape, typed) if in_products and _is_matrix(name) else shape
        kept[name] = jax.ShapeDtypeStruct(form, typed)
    return kept


def stored_bytes(config: ModelConfig, dtype: Dtype, quantization: Quantization) -> int:
    """Bytes of all parameters on the device."""
    kept = stored_params(config, dtype, quantization).values()
    return sum(int(np.prod(p.shape)) * jnp.dtype(p.dtype).itemsize for p in kept)


def put_on_device(
    config: ModelConfig,
    name: str,
    array: np.ndarray,
    dtype: Dtype,
    quantization: Quantization,
    device: jax.Device | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """A canonical parameter as it is kept, not stacked: itself, or its numbers and scales.

    The device may keep the array's own memory, so it must not be written to again. What is mapped
    from a file (read-only) is copied.
    """
    if quantization == "int8" and _is_matrix(name):
        numbers, scales = int8.quantize(array)
        yield name, put_matrix(numbers, device)
        yield name + SCALES, jax.device_put(scales, device)
        return
    typed = array.astype(_type(name, dtype), copy=not array.flags.writeable)
    in_products = name != "embed" or config.tie_embeddings
    # A stack has one axis more, and is kept as it is.
    put = put_matrix if in_products and _is_matrix(name) else jax.device_put
    yield name, put(typed, device)


def _is_matrix(name: str) -> bool:
    return not name.endswith(("norm", "bias"))


def _type(name: str, dtype: Dtype) -> jnp.dtype:
    return jnp.dtype(dtype if _is_matrix(name) else "float32")
