"""Calculated costs: the roofline of a step's arithmetic and memory traffic.

A step takes its operations divided by the peak rate, or its bytes divided by the bandwidth,
whichever is longer (the roofline: Williams, Waterman and Patterson, CACM 2009). Both rates are
reduced to the fraction that real programs reach. Kernel launches are added and, if the model is
sharded, two all-reduces of the activations per layer. A compute share lowers both rates, the
bandwidth less: a few multiprocessors can use more than their share of it.

- Prefill: `2 x weights` operations per token (the head only for the last token of each prompt), and
  attention of each token to all previous tokens.
- Decode: reads the weights once per step, and the keys and values of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from muxjax.placement.costs.devices import Device
from muxjax.placement.costs.model_shape import ModelShape

COMPUTE_EFFICIENCY = 0.6
"""Fraction of peak that large matrix products reach; docs/measurements/placement-notes.md."""
MEMORY_EFFICIENCY = 0.8
"""Fraction of the bandwidth that decoding reaches; docs/measurements/placement-notes.md."""
KERNELS_PER_LAYER = 8
"""Kernel launches per layer and step; an assumption."""
BANDWIDTH_SHARE_POWER = 0.5
"""Exponent of the compute share in the bandwidth; docs/measurements/placement-notes.md."""
_MAX_TP = 8


class _Sizes(NamedTuple):
    """Derived sizes of a model at one `tp`, cached because a simulation uses them every step."""

    layer_params: int
    head_params: int
    weight_bytes: float
    token_bytes: float


class Roofline:
    """A cost model from model shapes and device data.

    Args:
      shapes: model shapes by model name.
      device: the device that all models run on.
    """

    def __init__(self, shapes: Mapping[str, ModelShape], device: Device) -> None:
        self._shapes = dict(shapes)
        self._sizes: dict[tuple[str, int], _Sizes] = {}
        self.device = device

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models with costs."""
        return tuple(self._shapes)

    def shape(self, model: str) -> ModelShape:
        """The sizes of a model."""
        return self._shapes[model]

    def tp_sizes(self, model: str) -> tuple[int, ...]:
        """Powers of two that the heads can be sharded over, up to the usual size of a node."""
        shape = self._shapes[model]
        powers = [2**k for k in range(_MAX_TP.bit_length())]
        return tuple(tp for tp in powers if shape.supports_tp(tp))

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        """Multiples of 0.1, up to 1."""
        return tuple(k / 10 for k in range(1, 11))

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        if num_tokens <= 0:
            return 0.0
        shape, sizes = self._shapes[model], self._model_sizes(model, tp)
        length = min(length, num_tokens)
        prompts = num_tokens / length
        heads = shape.num_heads * shape.head_dim
        operations = 2 * (sizes.layer_params * num_tokens + sizes.head_params * prompts)
        # Two products (QK and PV) of 2 operations each, over half of the length on average.
        operations += 2 * shape.num_layers * heads * length * num_tokens
        moved = sizes.weight_bytes + num_tokens * sizes.token_bytes
        return self._seconds(shape, operations / tp, moved, num_tokens, tp, share)

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        """See `CostModel`."""
        shape, sizes = self._shapes[model], self._model_sizes(model, tp)
        batch = max(batch, 1.0)
        heads = shape.num_heads * shape.head_dim
        operations = 2 * batch * (sizes.layer_params + sizes.head_params)
        operations += 4 * shape.num_layers * heads * context * batch
        moved = sizes.weight_bytes + batch * context * sizes.token_bytes
        if not shape.tie_embeddings:  # only the rows of the tokens are read
            moved -= sizes.head_params * shape.embed_bits / 8 / tp
        return self._seconds(shape, operations / tp, moved, batch, tp, share)

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._model_sizes(model, tp).weight_bytes

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        """See `CostModel`."""
        return self._model_sizes(model, tp).token_bytes

    def _model_sizes(self, model: str, tp: int) -> _Sizes:
        sizes = self._sizes.get((model, tp))
        if sizes is None:
            shape = self._shapes[model]
            sizes = self._sizes[model, tp] = _Sizes(
                shape.layer_params,
                shape.head_params,
                shape.weight_bytes(tp),
                shape.kv_bytes_per_token(tp),
            )
        return sizes

    def _seconds(
        self,
        shape: ModelShape,
        operations: float,
        moved: float,
        tokens: float,
        tp: int,
        share: float,
    ) -> float:
        """Seconds of a step with these operations and moved bytes on each device."""
        if not 0 < share <= 1:
            raise ValueError(f"a compute share must be above 0 and at most 1, not {share}")
        device = self.device
        compute = operations / (device.flops * COMPUTE_EFFICIENCY * share)
        bandwidth = device.bandwidth * MEMORY_EFFICIENCY * share**BANDWIDTH_SHARE_POWER
        launches = shape.num_layers * KERNELS_PER_LAYER * device.launch_seconds
        all_reduces = 0.0
        if tp > 1:
            # Two all-reduces of 16-bit activations per layer. A ring sends and receives
            # 2 (tp - 1) / tp of the activations; each direction has half of the link bandwidth.
            activations = tokens * shape.hidden_size * 2.0
            ring = 2 * (tp - 1) / tp * activations / (device.link_bandwidth / 2)
            all_reduces = shape.num_layers * 2 * (ring + (tp - 1) * device.launch_seconds)
        return max(compute, moved / bandwidth) + all_reduces + launches
