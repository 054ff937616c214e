"""Tensor parallelism: the rows and columns of each parameter on each device.

As in Megatron-LM (Shoeybi et al. 2019, section 3), `qkv` and `gate_up` are sharded by rows, `o` and
`down` by columns. A layer then needs only two sums over the devices: one for its attention and one
for its MLP. Embedding and head are sharded by rows of the vocabulary. Norms are replicated, and so
are biases that are added after a sum.

Any `tp_size` is supported. A device has `kv_heads` key/value heads, each with `queries` of its
query heads:

- With more devices than KV heads, a KV head is replicated on several devices, which share its query
  heads.
- If sizes are not divisible by `tp_size`, heads, rows of the MLP and rows of the vocabulary are
  padded with zeros. A padding head contributes nothing: its columns of `o` are zeros.

SmolLM2's 9 query and 3 KV heads on 2, 4 and 8 devices become 2, 1 and 1 KV heads on each with 3, 3
and 2 queries. `local` is the config of one device's shard, which is an ordinary decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes

Segment = tuple[int | None, int]
"""Consecutive rows or columns of a parameter: index of the first (None for zeros) and count."""


@dataclass(frozen=True)
class Shards:
    """The sharding of a model over `tp_size` devices.

    Attributes:
      config: the whole model's config.
      tp_size: number of devices; with 1, nothing is sharded.

    Raises:
      ValueError: a `tp_size` below 1.
    """

    config: ModelConfig
    tp_size: int

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise ValueError(f"tp_size must be at least 1, not {self.tp_size}")

    @cached_property
    def _heads(self) -> tuple[int, int, int]:
        """KV heads per device, query heads of each, and replicas of each KV head.

        Minimizes the memory for keys and values, then the query heads, then the replicas.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        return min(
            (
                -(-self.config.num_kv_heads * replicas // self.tp_size),
                -(-group // replicas),
                replicas,
            )
            for replicas in range(1, group + 1)
        )

    @property
    def kv_heads(self) -> int:
        """KV heads of one device."""
        return self._heads[0]

    @property
    def queries(self) -> int:
        """Query heads of one device per KV head."""
        return self._heads[1]

    @cached_property
    def local(self) -> ModelConfig:
        """The config of one device's shard."""
        if self.tp_size == 1:
            return self.config
        return dataclasses.replace(
            self.config,
            num_heads=self.kv_heads * self.queries,
            num_kv_heads=self.kv_heads,
            intermediate_size=-(-self.config.intermediate_size // self.tp_size),
            vocab_size=-(-self.config.vocab_size // self.tp_size),
        )

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Canonical parameters and their shapes on one device."""
        return param_shapes(self.local)

    def shard_param(self, name: str, array: np.ndarray, device: int) -> np.ndarray:
        """One device's shard of a canonical parameter.

        Args:
          name: the parameter's name.
          array: the whole parameter.
          device: index of the device, from 0 to `tp_size - 1`.

        Returns:
          A view of `array` if the shard is contiguous, otherwise a new array.
        """
        sharding = self.segments(name, device)
        if sharding is None:
            return array
        axis, segments = sharding
        along = [slice(None)] * array.ndim
        parts = []
        for first, count in segments:
            if first is None:
                shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
                parts.append(np.zeros(shape, array.dtype))
            else:
                along[axis] = slice(first, first + count)
                parts.append(array[tuple(along)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    def segments(self, name: str, device: int) -> tuple[int, list[Segment]] | None:
        """The axis along which a parameter is sharded and a device's segments; None if replicated.

        Raises:
          ValueError: the parameter has no sharding rule.
        """
        short = name.rsplit(".", 1)[-1]
        if self.tp_size == 1 or short.endswith("norm") or short in ("o_bias", "down_bias"):
            return None
        H, F = self.config.head_dim, self.config.intermediate_size
        if short in ("embed", "head"):
            return 0, _merge(
                _device_segments(device, self.local.vocab_size, self.config.vocab_size)
            )
        if short in ("gate_up", "gate_up_bias"):
            gate = list(_device_segments(device, self.local.intermediate_size, F))
            up = [(None if first is None else first + F, count) for first, count in gate]
            return 0, _merge([*gate, *up])
        if short == "down":
            return 1, _merge(_device_segments(device, self.local.intermediate_size, F))
        queries = list(self._query_heads(device))
        if short == "o":
            return 1, _merge(_head_segments(queries, H))
        if short in ("qkv", "qkv_bias"):
            keys = list(self._kv_heads(device))
            offset = self.config.num_heads
            values = offset + self.config.num_kv_heads
            heads = [
                *queries,
                *(None if head is None else head + offset for head in keys),
                *(None if head is None else head + values for head in keys),
            ]
            return 0, _merge(_head_segments(heads, H))
        raise ValueError(f"no sharding rule for {name}")

    def _replicas(self, device: int) -> Iterator[tuple[int, int] | None]:
        """For each KV head of a device: its index and the replica's index; None for zeros."""
        kv_heads, _, replicas = self._heads
        for slot in range(device * kv_heads, (device + 1) * kv_heads):
            is_head = slot < self.config.num_kv_heads * replicas
            yield divmod(slot, replicas) if is_head else None

    def _kv_heads(self, device: int) -> Iterator[int | None]:
        for replica in self._replicas(device):
            yield None if replica is None else replica[0]

    def _query_heads(self, device: int) -> Iterator[int | None]:
        group = self.config.num_heads // self.config.num_kv_heads
        for replica in self._replicas(device):
            for index in range(self.queries):
                if replica is None:
                    yield None
                    continue
                kv_head, replica_index = replica
                within = replica_index * self.queries + index
                yield kv_head * group + within if within < group else None


def _device_segments(device: int, size: int, total: int) -> Iterator[Segment]:
    """A device's `size` of `total` rows or columns, padded with zeros."""
    first = min(total, device * size)
    count = min(size, total - first)
    if count:
        yield first, count
    if count < size:
        yield None, size - count


def _head_segments(heads: list[int | None], head_dim: int) -> Iterator[Segment]:
    """The rows or columns of heads; None for zeros."""
    for head in heads:
        yield None if head is None else head * head_dim, head_dim


def _merge(segments: Iterator[Segment] | list[Segment]) -> list[Segment]:
    """Merges adjacent segments."""
    merged: list[Segment] = []
    for first, count in segments:
        if merged:
            before, length = merged[-1]
            follows = (
                first is None if before is None else first is not None and before + length == first
            )
            if follows:
                merged[-1] = (before, length + count)
                continue
        merged.append((first, count))
    return merged
