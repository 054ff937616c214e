"""The config of a decoder: sizes, rotary embedding, windows, biases, norms and scales.

One `ModelConfig` describes every family; families differ only in its values. It is frozen and
hashable, as static arguments of compiled functions must be.
`checkpoints.hf_config.from_hf` and `checkpoints.gguf.from_gguf` read it from checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from muxjax.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    Attributes:
      theta: base of the geometric series of frequencies.
      scaling: None; 'linear' (all frequencies divided by `factor`); 'llama3' (low frequencies
        divided by `factor`, high ones unchanged, a ramp between); 'divisors' (each frequency
        divided by its entry of `divisors`, as Llama 3 GGUF files store the llama3 rule).
      factor, low_freq_factor, high_freq_factor, original_max_position: parameters of 'linear'
        (`factor`) and 'llama3' (all four; the last one in tokens).
      divisors: H/2 numbers for 'divisors'.

    Raises:
      CheckpointError: a number is not positive and finite, or the factors are in the wrong order.
    """

    theta: float = 10000.0
    scaling: Literal["linear", "llama3", "divisors"] | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = [self.theta, self.factor, self.low_freq_factor, self.high_freq_factor]
        numbers += [self.original_max_position, *self.divisors]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise CheckpointError(f"the rotary embedding needs positive finite numbers: {self}")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"llama3 rope scaling needs high_freq_factor ({self.high_freq_factor}) above "
                f"low_freq_factor ({self.low_freq_factor})"
            )


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, "half_H"]:
    """Angle per position, in radians, of each of the H/2 rotated pairs.

    Pair i of a head is its elements (i, i + H/2): Hugging Face's "half rotation" order.

    Raises:
      CheckpointError: the length of `rope.divisors` is not H/2.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    # Rounded to float32 after each operation, as in training and in the reference implementation.
    periods = np.power(np.float64(rope.theta), exponents).astype(np.float32)
    frequencies: np.ndarray = np.float32(1.0) / periods
    if rope.scaling == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.scaling == "llama3":
        frequencies = _llama3_scaled(frequencies, rope)
    elif rope.scaling == "divisors":
        if len(rope.divisors) != head_dim // 2:
            raise CheckpointError(
                f"rope needs {head_dim // 2} divisors for a head of {head_dim}, not "
                f"{len(rope.divisors)}"
            )
        frequencies = frequencies / np.asarray(rope.divisors, np.float32)
    return frequencies.astype(np.float32)


def _llama3_scaled(
    frequencies: Float32[np.ndarray, "half_H"], rope: RopeConfig
) -> Float32[np.ndarray, "half_H"]:
    """Llama 3.1's rule: a pair's scaling depends on its turns within the original context."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    unscaled = np.clip(ramp, 0.0, 1.0)  # 0: divided by the factor, 1: unchanged
    scaled = (1 - unscaled) * frequencies / rope.factor + unscaled * frequencies
    return scaled.astype(np.float32)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of one decoder. Letters in brackets are the project's axis letters.

    Attributes:
      family: the model family; used only by loaders and in messages.
      vocab_size [V], num_layers [L], hidden_size [D], intermediate_size [F], num_heads [N],
        num_kv_heads [K], head_dim [H]: sizes.
      max_position: the model's context length, in tokens.
      norm_eps: added to the mean square in every RMSNorm.
      activation: activation function of the gated MLP.
      rope: rotary embedding of full layers (and of sliding ones where `local_rope` is None).
      local_rope: rotary embedding of sliding layers (Gemma 3), or None.
      sliding_window: visible tokens in a sliding layer: the token and `sliding_window - 1` before.
      layer_is_sliding: whether the window applies, per layer; all False without a window.
      qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
      qk_norm: RMSNorm over H of queries and keys, before the rotary embedding.
      post_norms: additional norms after attention and after the MLP, before the residual sum
        (Gemma).
      embed_scale: multiplies embeddings (sqrt(D) for Gemma, else 1).
      attn_scale: multiplies the attention logits.
      attn_softcap, final_softcap: cap * tanh(x / cap) on attention logits and on output logits.
      tie_embeddings: whether the output head is the embedding.
      bos_token_id: id of the begin token, or None.
      eos_token_ids: ids of the tokens that end an output.

    Raises:
      CheckpointError: a size is not positive, or options contradict each other.
    """

    family: Family
    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    sliding_window: int | None = None
    layer_is_sliding: tuple[bool, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attn_scale: float = 0.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size num_layers hidden_size intermediate_size num_heads num_kv_heads head_dim"
        )
        for name in (*sizes.split(), "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} must be a positive whole number, not {value!r}")
        if self.family not in FAMILIES:
            raise CheckpointError(f"unknown family {self.family!r}; known: {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"head_dim must be even for the rotary embedding, not {self.head_dim}"
            )
        if self.norm_eps <= 0:
            raise CheckpointError(f"norm_eps must be positive, not {self.norm_eps!r}")
        if self.attn_scale == 0.0:
            object.__setattr__(self, "attn_scale", self.head_dim**-0.5)
        if not self.layer_is_sliding:
            object.__setattr__(self, "layer_is_sliding", (False,) * self.num_layers)
        if len(self.layer_is_sliding) != self.num_layers:
            raise CheckpointError(
                f"{len(self.layer_is_sliding)} layer types for {self.num_layers} layers"
            )
        if any(self.layer_is_sliding) and (self.sliding_window is None or self.sliding_window < 1):
            raise CheckpointError(
                f"sliding layers need a positive sliding_window, not {self.sliding_window!r}"
            )

    @property
    def q_width(self) -> int:
        """Width of all queries of a token: N * H."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys (or all values) of a token: K * H."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection: (N + 2K) * H."""
        return self.q_width + 2 * self.kv_width

    def layer_window(self, layer: int) -> int | None:
        """The window of a layer in tokens, or None for full attention."""
        return self.sliding_window if self.layer_is_sliding[layer] else None

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary embedding of a layer."""
        if self.local_rope is not None and self.layer_is_sliding[layer]:
            return self.local_rope
        return self.rope


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, also after a round trip through JSON.

    Raises:
      KeyError, TypeError: keys are missing, unknown or of the wrong type.
      CheckpointError: the values are not a valid config.
    """
    values = dict(data)
    for name in ("rope", "local_rope"):
        if values.get(name) is not None:
            rope = dict(values[name])
            rope["divisors"] = tuple(rope["divisors"])
            values[name] = RopeConfig(**rope)
    for name in ("layer_is_sliding", "eos_token_ids"):
        values[name] = tuple(values[name])
    return ModelConfig(**values)
