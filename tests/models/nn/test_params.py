"""The mapping between checkpoint tensors and canonical parameters, in both directions."""

from __future__ import annotations

import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.gguf import gguf_mapping
from muxjax.models.checkpoints.hf import hf_mapping
from muxjax.models.nn.params import (
    ParamMapping,
    assemble_param,
    check_shapes,
    param_shapes,
    split_param,
    stored_shapes,
    to_half_rotation,
    to_interleaved,
)
from tests import golden


def test_half_rotation_reorders_the_rows_of_heads() -> None:
    interleaved = np.array([0, 10, 1, 11, 2, 12, 3, 13, 20, 30, 21, 31, 22, 32, 23, 33])
    halves = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]
    np.testing.assert_array_equal(to_half_rotation(interleaved, 2), halves)
    np.testing.assert_array_equal(to_interleaved(np.array(halves), 2), interleaved)
    matrix = np.arange(48).reshape(16, 3)
    np.testing.assert_array_equal(to_half_rotation(to_interleaved(matrix, 2), 2), matrix)


@pytest.mark.parametrize("name", golden.tiny_names())
@pytest.mark.parametrize("mapping", [hf_mapping, gguf_mapping])
def test_split_and_assemble_round_trip(name: str, mapping: type) -> None:
    case = golden.tiny(name)
    mapped: ParamMapping = mapping(case.config)
    assert list(mapped) == list(param_shapes(case.config)) == list(case.params)
    stored: dict[str, np.ndarray] = {}
    for canonical, parts in mapped.items():
        for stored_name, array in split_param(parts, case.params[canonical]):
            assert stored_name not in stored
            stored[stored_name] = array
    assert {name: array.shape for name, array in stored.items()} == stored_shapes(
        case.config, mapped
    )
    for canonical, parts in mapped.items():
        assembled = assemble_param(parts, stored.__getitem__)
        # Subtracting and adding one to Gemma's norms may change the last bit.
        np.testing.assert_allclose(assembled, case.params[canonical], rtol=0, atol=1e-6)


def test_parameters_follow_the_config_options() -> None:
    qwen2 = param_shapes(golden.tiny("qwen2").config)
    assert qwen2["layers.1.qkv"] == (128, 64)
    assert qwen2["layers.1.qkv_bias"] == (128,)
    assert qwen2["layers.1.gate_up"] == (192, 64)
    assert "head" not in qwen2
    assert "layers.0.q_norm" not in qwen2
    gemma = param_shapes(golden.tiny("gemma3").config)
    assert gemma["layers.0.q_norm"] == (32,)
    assert gemma["layers.0.post_mlp_norm"] == (64,)
    assert "layers.0.qkv_bias" not in gemma
    assert param_shapes(golden.tiny("llama").config)["head"] == (128, 64)


def test_mismatched_tensors_are_named_in_the_error() -> None:
    expected = {"a": (2, 3), "b": (4,)}
    check_shapes("file", {"a": (2, 3), "b": (4,)}, expected)
    check_shapes("file", {"a": (2, 3), "b": (4,), "c": (1,)}, expected, lambda name: name == "c")
    with pytest.raises(CheckpointError, match=r"file: tensor b \[4\] is missing"):
        check_shapes("file", {"a": (2, 3)}, expected)
    with pytest.raises(
        CheckpointError, match=r"file: tensor a has shape \[3, 2\], expected \[2, 3\]"
    ):
        check_shapes("file", {"a": (3, 2), "b": (4,)}, expected)
    with pytest.raises(CheckpointError, match="this architecture does not have: c"):
        check_shapes("file", {"a": (2, 3), "b": (4,), "c": (1,)}, expected)
