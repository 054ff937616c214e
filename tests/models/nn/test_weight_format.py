"""The declared format of stored parameters, against the arrays on the device."""

import jax
import jax.numpy as jnp
import pytest

from muxjax.models.checkpoints.buffers import aligned_empty
from muxjax.models.nn.params import param_shapes
from muxjax.models.nn.weight_format import (
    Dtype,
    Quantization,
    put_on_device,
    stored_bytes,
    stored_params,
)
from tests import golden


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_put_on_device_matches_stored_params(
    name: str, dtype: Dtype, quantization: Quantization
) -> None:
    case = golden.tiny(name)
    arrays: dict[str, jax.Array] = {}
    for canonical, array in case.params.items():
        arrays.update(put_on_device(case.config, canonical, array, dtype, quantization))
    expected = stored_params(case.config, dtype, quantization)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
        n: (a.shape, a.dtype) for n, a in expected.items()
    }
    assert sum(a.nbytes for a in arrays.values()) == stored_bytes(case.config, dtype, quantization)
    for canonical, shape in param_shapes(case.config).items():
        if len(shape) == 1:
            assert arrays[canonical].dtype == jnp.float32


def test_read_only_arrays_are_copied() -> None:
    case = golden.tiny("llama")
    memory = aligned_empty(case.params["final_norm"].shape, "float32")
    memory[...] = 1
    mapped = memory.view()
    mapped.flags.writeable = False
    [(_, array)] = put_on_device(case.config, "final_norm", mapped, "float32", "none")
    memory[...] = 2
    assert (array == 1).all()
