"""Writes small GGUF files for tests, with the names and the row order of llama.cpp's converter.

Names come from the `gguf` package's table, and the reordering is implemented separately. The
loader's tables are therefore tested against independent ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from muxjax.models.checkpoints.hf import hf_mapping
from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import split_param

ARCHITECTURES = {"mistral": "llama"}


def hf_tensors(config: ModelConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical parameters as Hugging Face stores them."""
    return {
        name: array
        for canonical, parts in hf_mapping(config).items()
        for name, array in split_param(parts, params[canonical])
    }


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Makes rows i and i + H/2 of each head adjacent."""
    head_dim = len(rows) // heads
    order = [
        head * head_dim + pair + half * (head_dim // 2)
        for head in range(heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return rows[order]


def write_gguf(
    path: Path,
    config: ModelConfig,
    params: dict[str, np.ndarray],
    *,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    quantize: gguf.GGMLQuantizationType | None = None,
) -> None:
    """Writes a model.

    Args:
      path: the file's path.
      config, params: the model.
      metadata: additional keys, without the architecture's name; a value of None omits a key.
      extra: additional tensors.
      quantize: type of the stored matrices; by default float32.
    """
    architecture = ARCHITECTURES.get(config.family, config.family)
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,
        "attention.sliding_window": config.sliding_window,
        "final_logit_softcapping": config.final_softcap,
    } | (metadata or {})
    for key, value in values.items():
        full = f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        elif value is not None:
            writer.add_uint32(full, value)
    names = gguf.get_tensor_name_map(writer_arch(architecture), config.num_layers)
    tensors = hf_tensors(config, params)
    for name, array in tensors.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_heads if ".q_proj" in name else config.num_kv_heads
            array = llama_cpp_order(array, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        array = np.ascontiguousarray(array, np.float32)
        if quantize is not None and array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(stored, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def writer_arch(name: str) -> gguf.MODEL_ARCH:
    """The `gguf` package's key of an architecture."""
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
