"""Checkpoints in GGUF files: the config from the metadata, and the names of the tensors.

For the architecture `llama`, which includes Mistral, llama.cpp's converter reorders the rows of the
query and key projections for interleaved rotation. Other architectures are stored in Hugging Face's
order. Gemma's norm weights are stored as multipliers (Hugging Face stores them minus one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from muxjax.errors import CheckpointError
from muxjax.models.checkpoints.checkpoint import Checkpoint
from muxjax.models.checkpoints.gguf_file import GGUFFile
from muxjax.models.checkpoints.source_files import SourceFiles
from muxjax.models.nn.config import Family, ModelConfig, RopeConfig
from muxjax.models.nn.params import ParamMapping, Shape, map_names
from muxjax.models.tokenizers.gguf_tokenizer import end_token_ids, tokenizer_from_gguf

ARCHITECTURES: dict[str, Family] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "attn_norm.weight",
    "qkv": "attn_q.weight attn_k.weight attn_v.weight",
    "qkv_bias": "attn_q.bias attn_k.bias attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "post_attn_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate_up": "ffn_gate.weight ffn_up.weight",
    "gate_up_bias": "ffn_gate.bias ffn_up.bias",
    "down": "ffn_down.weight",
    "down_bias": "ffn_down.bias",
    "post_mlp_norm": "post_ffw_norm.weight",
}
LAYER_PREFIX = "blk.{}."
ROPE_DIVISORS = "rope_freqs.weight"

_GEMMA3_27B_LAYERS = 62
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_PATTERN = 6


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file.

    Raises:
      CheckpointError: the file is not GGUF or is truncated, its architecture is unknown, an option
        is not supported, or its tensors do not match its metadata.
    """
    files = SourceFiles.record([path])
    file = GGUFFile(path)
    divisors: tuple[float, ...] = ()
    if ROPE_DIVISORS in file.tensors:
        divisors = tuple(float(value) for value in file.read(ROPE_DIVISORS))
    try:
        config = from_gguf(file.metadata, file.shapes(), rope_divisors=divisors)
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(
        config=config,
        origin=str(path),
        source=file,
        mapped=gguf_mapping(config),
        build_tokenizer=lambda: tokenizer_from_gguf(file.metadata, str(path)),
        ignored=lambda name: name == ROPE_DIVISORS,
        files=files,
    )


def gguf_mapping(config: ModelConfig) -> ParamMapping:
    """The GGUF tensors of each canonical parameter."""
    interleaved = config.family in ("llama", "mistral")
    return map_names(config, NAMES, LAYER_PREFIX, interleaved=interleaved)


class _Metadata:
    """The metadata keys of one architecture; errors name the key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])  # one number per layer, all equal
        if not isinstance(value, int) or isinstance(value, bool):
            full = f"{self._architecture}.{key}"
            if value is None:
                raise CheckpointError(f"metadata has no {full}")
            raise CheckpointError(f"{full} must be one whole number, not {value!r}")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        value = self.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self._architecture}.{key} = {value!r} is not supported")


def from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    *,
    rope_divisors: tuple[float, ...] = (),
) -> ModelConfig:
    """Reads the config of a GGUF file.

    Args:
      metadata: the file's metadata.
      shapes: its tensors; their names show whether it has biases and a tied output head.
      rope_divisors: the values of `rope_freqs.weight`, if the file has it.

    Raises:
      CheckpointError: an unknown architecture, a missing key, or an option that is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[architecture]
    gemma = family == "gemma3"
    values = _Metadata(metadata, architecture)
    values.require("expert_count", 0)
    if "token_embd.weight" not in shapes:
        raise CheckpointError("tensor token_embd.weight is missing")
    D, N = values.integer("embedding_length"), values.integer("attention.head_count")
    H = values.integer("attention.key_length", D // max(N, 1))
    values.require("attention.value_length", H)
    values.require("rope.dimension_count", H)
    L = values.integer("block_count")
    window, sliding = _window(values, L, gemma)
    softcaps = (values.get("attn_logit_softcapping"), values.get("final_logit_softcapping"))
    attn_scale = H**-0.5
    if gemma and L == _GEMMA3_27B_LAYERS:
        # This size scales by its width per head; the metadata do not contain the scale.
        attn_scale = (D / N) ** -0.5
    local_rope = None
    if gemma:
        local_rope = RopeConfig(float(values.get("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)))
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        num_layers=L,
        hidden_size=D,
        intermediate_size=values.integer("feed_forward_length"),
        num_heads=N,
        num_kv_heads=values.integer("attention.head_count_kv", N),
        head_dim=H,
        max_position=values.integer("context_length"),
        norm_eps=float(values.get("attention.layer_norm_rms_epsilon", 1e-6)),
        activation="gelu_tanh" if gemma else "silu",
        rope=_rope(values, rope_divisors),
        local_rope=local_rope,
        sliding_window=window,
        layer_is_sliding=sliding,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        embed_scale=math.sqrt(D) if gemma else 1.0,
        attn_scale=attn_scale,
        attn_softcap=None if softcaps[0] is None else float(softcaps[0]),
        final_softcap=None if softcaps[1] is None else float(softcaps[1]),
        tie_embeddings="output.weight" not in shapes,
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=end_token_ids(metadata),
    )


def _rope(values: _Metadata, divisors: tuple[float, ...]) -> RopeConfig:
    theta = float(values.get("rope.freq_base", 10000.0))
    scaling = values.get("rope.scaling.type", "none")
    factor = float(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)))
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"rope scaling {scaling!r} is not supported; known: none, linear")
    if divisors:
        if factor != 1.0 and scaling == "linear":
            raise CheckpointError("both linear rope scaling and rope divisors: not supported")
        return RopeConfig(theta, "divisors", divisors=divisors)
    # Old files have a factor and no type; they mean linear.
    is_linear = factor != 1.0 and (scaling == "linear" or values.get("rope.scaling.type") is None)
    return RopeConfig(theta, "linear", factor) if is_linear else RopeConfig(theta)


def _window(values: _Metadata, layers: int, gemma: bool) -> tuple[int | None, tuple[bool, ...]]:
    window = values.get("attention.sliding_window")
    if not window:
        return None, (False,) * layers
    pattern = values.get("attention.sliding_window_pattern", _GEMMA3_PATTERN if gemma else 1)
    if isinstance(pattern, (list, np.ndarray)):
        return int(window), tuple(bool(value) for value in pattern)
    if not gemma:
        return int(window), (True,) * layers
    return int(window), tuple((layer + 1) % pattern != 0 for layer in range(layers))
