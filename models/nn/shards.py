"""How a model is cut for tensor parallelism: which rows and columns each device keeps.

As in Megatron-LM (Shoeybi et al. 2019, section 3): `qkv` and `gate_up` by rows, `o` and `down` by
columns, so that a layer needs one sum over the devices for its attention and one for its MLP;
embedding and head by rows of the vocabulary. Norms, and biases that are added after a sum, are on
every device.

Any degree works. A device keeps `kv_heads` key/value heads, each with `queries` of its query heads:

- more devices than KV heads: a KV head is on several devices, which share its query heads;
- numbers that do not divide: heads, rows of the MLP and of the vocabulary are filled up with zeros.
  A head of zeros gives zeros to `o`, whose columns for it are zeros too, so nothing changes.

SmolLM2's 9 query and 3 KV heads on 2, 4 and 8 devices become 2, 1 and 1 KV heads on each with 3, 3
and 2 queries. The parameters of one device are those of an ordinary decoder of `local`'s sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.params import Shape, param_shapes

Piece = tuple[int | None, int]
"""Some consecutive rows or columns of a parameter: the first (None: zeros) and how many."""


@dataclass(frozen=True)
class Shards:
    """A model cut for `tp_size` devices.

    Attributes:
      config: the whole model.
      tp_size: devices; 1 leaves everything whole.
    """

    config: ModelConfig
    tp_size: int

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise ValueError(f"a model is cut for at least one device, not {self.tp_size}")

    @cached_property
    def _heads(self) -> tuple[int, int, int]:
        """KV heads on a device, queries of each, and on how many devices a KV head is.

        The least memory for keys and values, then the fewest queries, then the fewest copies.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        return min(
            (-(-self.config.num_kv_heads * spread // self.tp_size), -(-group // spread), spread)
            for spread in range(1, group + 1)
        )

    @property
    def kv_heads(self) -> int:
        """`K` of one device."""
        return self._heads[0]

    @property
    def queries(self) -> int:
        """Query heads of one device for each of its KV heads."""
        return self._heads[1]

    @cached_property
    def local(self) -> ModelConfig:
        """The sizes that one device sees."""
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
        """Every canonical parameter with its shape on one device."""
        return param_shapes(self.local)

    def cut(self, name: str, array: np.ndarray, device: int) -> np.ndarray:
        """What one device keeps of a canonical parameter.

        Args:
          name: of the parameter.
          array: the whole of it.
          device: from 0 to `tp_size - 1`.

        Returns:
          A view of `array` where that is enough, else a new array.
        """
        cut = self.pieces(name, device)
        if cut is None:
            return array
        axis, pieces = cut
        along = [slice(None)] * array.ndim
        parts = []
        for first, count in pieces:
            if first is None:
                shape = (*array.shape[:axis], count, *array.shape[axis + 1 :])
                parts.append(np.zeros(shape, array.dtype))
            else:
                along[axis] = slice(first, first + count)
                parts.append(array[tuple(along)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    def pieces(self, name: str, device: int) -> tuple[int, list[Piece]] | None:
        """The axis along which a parameter is cut, and a device's pieces; None: it keeps all."""
        short = name.rsplit(".", 1)[-1]
        if self.tp_size == 1 or short.endswith("norm") or short in ("o_bias", "down_bias"):
            return None
        H, F = self.config.head_dim, self.config.intermediate_size
        if short in ("embed", "head"):
            return 0, _joined(_part(device, self.local.vocab_size, self.config.vocab_size))
        if short in ("gate_up", "gate_up_bias"):
            gate = list(_part(device, self.local.intermediate_size, F))
            up = [(None if first is None else first + F, count) for first, count in gate]
            return 0, _joined([*gate, *up])
        if short == "down":
            return 1, _joined(_part(device, self.local.intermediate_size, F))
        queries = list(self._query_heads(device))
        if short == "o":
            return 1, _joined(_times(queries, H))
        if short in ("qkv", "qkv_bias"):
            keys = list(self._kv_heads(device))
            offset = self.config.num_heads
            values = offset + self.config.num_kv_heads
            heads = [
                *queries,
                *(None if head is None else head + offset for head in keys),
                *(None if head is None else head + values for head in keys),
            ]
            return 0, _joined(_times(heads, H))
        raise ValueError(f"no rule for cutting {name}")

    def _virtual(self, device: int) -> Iterator[tuple[int, int] | None]:
        """Each KV head of a device: which it is, and which part of its queries; None for zeros."""
        kv_heads, _, spread = self._heads
        for slot in range(device * kv_heads, (device + 1) * kv_heads):
            real = slot < self.config.num_kv_heads * spread
            yield divmod(slot, spread) if real else None

    def _kv_heads(self, device: int) -> Iterator[int | None]:
        for virtual in self._virtual(device):
            yield None if virtual is None else virtual[0]

    def _query_heads(self, device: int) -> Iterator[int | None]:
        group = self.config.num_heads // self.config.num_kv_heads
        for virtual in self._virtual(device):
            for index in range(self.queries):
                if virtual is None:
                    yield None
                    continue
                kv_head, part = virtual
                within = part * self.queries + index
                yield kv_head * group + within if within < group else None


def _part(device: int, size: int, total: int) -> Iterator[Piece]:
    """A device's `size` of `total` numbers, zeros beyond."""
    first = min(total, device * size)
    count = min(size, total - first)
    if count:
        yield first, count
    if count < size:
        yield None, size - count


def _times(heads: list[int | None], head_dim: int) -> Iterator[Piece]:
    for head in heads:
        yield None if head is None else head * head_dim, head_dim


def _joined(pieces: Iterator[Piece] | list[Piece]) -> list[Piece]:
    """The same with neighbours put together."""
    joined: list[Piece] = []
    for first, count in pieces:
        if joined:
            before, length = joined[-1]
            follows = (
                first is None if before is None else first is not None and before + length == first
            )
            if follows:
                joined[-1] = (before, length + count)
                continue
        joined.append((first, count))
    return joined
