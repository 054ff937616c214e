"""Sizes of a model, and the bytes of its weights and KV cache.

The weights are:
- the matrices of the layers, with `weight_bits` bits per weight, quantized or not;
- the embedding and, unless it is tied, the output head, with `embed_bits` bits per weight (16 in
  most quantized checkpoints);
- norms and biases, in float32 on every device.

KV: `2 L K H` numbers per token, independent of the number of query heads. Tensor parallelism shards
the heads; with more devices than KV heads each device has one KV head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs. Letters in brackets are the project's axis letters.

    Attributes:
      num_layers [L], hidden_size [D], intermediate_size [F], num_heads [N], num_kv_heads [K],
        head_dim [H], vocab_size [V]: sizes.
      tie_embeddings: the output head is the embedding.
      weight_bits: bits per weight of the layers' matrices, scales included.
      embed_bits: bits per weight of the embedding and of the output head.
      kv_bits: bits per number in the KV pool.
      small_params: number of norm and bias parameters, float32 on every device.
      max_position: the model's context length, in tokens.

    Raises:
      ValueError: a size that is not positive, or `num_heads` that is not a multiple of
        `num_kv_heads`.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool = False
    weight_bits: float = 16.0
    embed_bits: float = 16.0
    kv_bits: float = 16.0
    small_params: int = 0
    max_position: int = 2048

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            minimum = 0 if name in ("small_params", "tie_embeddings") else 1
            if not (math.isfinite(value) and value >= minimum):
                raise ValueError(f"{name} must be at least {minimum}, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )

    @property
    def layer_params(self) -> int:
        """Number of weights in the matrices of all layers."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_params(self) -> int:
        """Number of weights of the output head, tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """Number of all weights. Tied embeddings count once."""
        tables = self.head_params * (1 if self.tie_embeddings else 2)
        return self.layer_params + tables + self.small_params

    def kv_heads_per_device(self, tp: int) -> int:
        """KV heads on each of `tp` devices; heads are replicated if `tp > K`."""
        return -(-self.num_kv_heads // tp)

    def supports_tp(self, tp: int) -> bool:
        """Whether the heads can be sharded over `tp` devices."""
        kv_heads_divide = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
        return self.num_heads % tp == 0 and kv_heads_divide

    def weight_bytes(self, tp: int = 1) -> float:
        """Weight bytes on each of `tp` devices."""
        replicated = self.kv_heads_per_device(tp) - self.num_kv_heads / tp
        extra = 2 * self.num_layers * self.hidden_size * replicated * self.head_dim
        layers = (self.layer_params / tp + extra) * self.weight_bits
        tables = self.head_params * (1 if self.tie_embeddings else 2) * self.embed_bits / tp
        return (layers + tables) / 8 + 4 * self.small_params

    def kv_bytes_per_token(self, tp: int = 1) -> float:
        """KV bytes of one token, all layers, on each of `tp` devices."""
        heads = self.kv_heads_per_device(tp)
        return 2 * self.num_layers * heads * self.head_dim * self.kv_bits / 8


def _llama(layers: int, width: int, feed_forward: int, heads: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        vocab_size=32000,
        small_params=(2 * layers + 1) * width,
    )


LLAMA_SHAPES: Mapping[str, ModelShape] = {
    "llama-7b": _llama(32, 4096, 11008, 32),
    "llama-13b": _llama(40, 5120, 13824, 40),
    "llama-30b": _llama(60, 6656, 17920, 52),
    "llama-65b": _llama(80, 8192, 22016, 64),
}
"""LLaMA models in 16 bits, by their names in MuxServe's profile (Touvron et al., 2023, table 2;
feed-forward widths from the released checkpoints)."""
