"""GGUF checkpoints of every architecture, written with llama.cpp's names and row order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.gguf import open_gguf
from muxjax.models.nn.config import RopeConfig
from tests import golden
from tests.models.gguf_files import write_gguf

FAMILIES = ("llama", "llama_biases", "smollm2", "qwen2", "qwen3", "gemma3")


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_config_round_trip(name: str, tmp_path: Path) -> None:
    case = golden.tiny(name)
    path = tmp_path / "model.gguf"
    sliding = [int(value) for value in case.config.layer_is_sliding]
    metadata = {"attention.sliding_window_pattern": sliding} if name == "gemma3" else {}
    write_gguf(path, case.config, case.params, metadata=metadata)
    checkpoint = open_gguf(path)
    weights = dict(checkpoint.weights())
    assert list(weights) == list(case.params)
    for canonical, array in weights.items():
        np.testing.assert_allclose(array, case.params[canonical], rtol=0, atol=1e-6)
    config = checkpoint.config
    assert config.attn_scale == case.config.head_dim**-0.5  # not stored in the file
    assert config.norm_eps == pytest.approx(case.config.norm_eps)
    ignored = {"attn_scale": 1.0, "norm_eps": 1.0, "bos_token_id": None, "eos_token_ids": ()}
    assert dataclasses.replace(config, **ignored) == dataclasses.replace(case.config, **ignored)
    assert checkpoint.tokenizer is None


def test_quantized_weights_are_approximately_equal(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, case.config, case.params, quantize=gguf.GGMLQuantizationType.Q8_0)
    for name, array in open_gguf(path).weights():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, case.params[name], atol=0.02)


def test_mistral_files_have_architecture_llama_and_a_window(tmp_path: Path) -> None:
    case = golden.tiny("mistral")
    path = tmp_path / "model.gguf"
    write_gguf(path, case.config, case.params)
    config = open_gguf(path).config
    assert config.family == "llama"
    assert config.sliding_window == 8
    assert config.layer_is_sliding == (True, True)


def test_gemma_without_pattern_has_five_sliding_layers_per_full_layer(tmp_path: Path) -> None:
    case = golden.tiny("gemma3")
    path = tmp_path / "model.gguf"
    write_gguf(path, case.config, case.params, metadata={"rope.scaling.factor": 8.0})
    config = open_gguf(path).config
    assert config.layer_is_sliding == (True, True, True, True)
    assert config.rope == RopeConfig(1_000_000.0, "linear", 8.0)
    assert config.local_rope == RopeConfig(10_000.0)
    assert config.embed_scale == 8.0


def test_rope_divisors_of_llama3_files_are_read(tmp_path: Path) -> None:
    case = golden.tiny("llama")
    path = tmp_path / "model.gguf"
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(path, case.config, case.params, extra={"rope_freqs.weight": divisors})
    config = open_gguf(path).config
    assert config.rope == RopeConfig(10000.0, "divisors", divisors=tuple(divisors.tolist()))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count = 8 is not supported"),
        ({"rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"context_length": None}, "metadata has no llama.context_length"),
        ({"attention.head_count_kv": [2, 1]}, "must be one whole number"),
        ({"block_count": 3}, r"tensor blk.2.attn_norm.weight \[64\] is missing"),
        ({"feed_forward_length": 80}, r"ffn_gate.weight has shape \[96, 64\], expected \[80, 64\]"),
        ({"block_count": 1}, "tensors that this architecture does not have: blk.1."),
    ],
)
def test_mismatches_are_rejected(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    case = golden.tiny("llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, case.config, case.params, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_unknown_architecture_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="unknown architecture 'mamba'; known: llama, qwen2"):
        open_gguf(path)
