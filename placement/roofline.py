"""Costs by calculation: what the arithmetic and the memory traffic of a step take at least.

A step takes the longer of its operations over the peak rate and its bytes over the bandwidth (the
roofline: Williams, Waterman and Patterson, CACM 2009), each at the part of the peak that real
programs reach, and to that come two all-reduces of the activations a layer where the model is split
over devices, and the launch of its kernels. With a share of the compute both rates shrink, the
bandwidth less: few multiprocessors can ask for more than their share of it.

- Prefill: `2 x weights` operations a token (the head only for the last token of each prompt) and
  attention of each token to those before it.
- Decode: the weights once a step, and each sequence's keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

from muxjax.placement.devices import Device
from muxjax.placement.model_shape import ModelShape

COMPUTE_EFFICIENCY = 0.6
"""Part of the peak that large matrix products reach: MuxServe's profile has 0.57 for LLaMA 7B."""
MEMORY_EFFICIENCY = 0.8
"""Part of the bandwidth that decoding reaches: measured 0.77 on a CPU (README.md)."""
KERNELS_A_LAYER = 8
BANDWIDTH_SHARE_POWER = 0.5
"""Bandwidth at a share of the compute, as a power of the share: in MuxServe's profile LLaMA 7B
decodes at 30 % of the multiprocessors 1.4 to 1.8 times slower, not 3.3."""
_MAX_DEGREE = 8


class Roofline:
    """A `CostModel` from the models' shapes and a device's figures.

    Args:
      shapes: by name.
      device: what all of them run on.
    """

    def __init__(self, shapes: Mapping[str, ModelShape], device: Device) -> None:
        self._shapes = dict(shapes)
        self.device = device

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the shapes."""
        return tuple(self._shapes)

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""
        return self._shapes[model]

    def tp_degrees(self, model: str) -> tuple[int, ...]:
        """Powers of two that split the heads, up to a node's usual size."""
        shape = self._shapes[model]
        powers = [2**k for k in range(_MAX_DEGREE.bit_length())]
        return tuple(tp for tp in powers if shape.supports_tp(tp))

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """Tenths."""
        return tuple(k / 10 for k in range(1, 11))

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        if num_tokens <= 0:
            return 0.0
        shape = self._shapes[model]
        length = min(length, num_tokens)
        prompts = num_tokens / length
        heads = shape.num_heads * shape.head_dim
        operations = 2 * (shape.layer_params * num_tokens + shape.head_params * prompts)
        operations += 2 * shape.num_layers * heads * length * num_tokens  # half of length, Q and V
        moved = shape.weight_bytes(tp) + num_tokens * shape.kv_bytes_per_token(tp)
        return self._seconds(shape, operations / tp, moved, num_tokens, tp, share)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        shape = self._shapes[model]
        batch = max(batch, 1.0)
        heads = shape.num_heads * shape.head_dim
        operations = 2 * batch * (shape.layer_params + shape.head_params)
        operations += 4 * shape.num_layers * heads * context * batch
        moved = shape.weight_bytes(tp) + batch * context * shape.kv_bytes_per_token(tp)
        if not shape.tie_embeddings:  # of the embedding only the tokens' rows are read
            moved -= shape.head_params * shape.embed_bits / 8 / tp
        return self._seconds(shape, operations / tp, moved, batch, tp, share)

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].weight_bytes(tp)

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._shapes[model].kv_bytes_per_token(tp)

    def _seconds(
        self,
        shape: ModelShape,
        operations: float,
        moved: float,
        tokens: float,
        tp: int,
        share: float,
    ) -> float:
        """Seconds of a step: on each device so many operations and bytes, for so many tokens."""
        if not 0 < share <= 1:
            raise ValueError(f"a share of compute is above 0 and at most 1, not {share}")
        device = self.device
        compute = operations / (device.flops * COMPUTE_EFFICIENCY * share)
        bandwidth = device.bandwidth * MEMORY_EFFICIENCY * share**BANDWIDTH_SHARE_POWER
        launches = shape.num_layers * KERNELS_A_LAYER * device.launch_seconds
        reduced = 0.0
        if tp > 1:
            # A ring sends and receives 2 (tp - 1) / tp of the activations, each way at half of what
            # both directions have together; two all-reduces of 16-bit activations a layer.
            activations = tokens * shape.hidden_size * 2.0
            ring = 2 * (tp - 1) / tp * activations / (device.link_bandwidth / 2)
            reduced = shape.num_layers * 2 * (ring + (tp - 1) * device.launch_seconds)
        return max(compute, moved / bandwidth) + reduced + launches
