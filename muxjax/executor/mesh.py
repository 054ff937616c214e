"""The devices of a unit as its programs see them.

A model on `n` devices is cut for `tp_size` of them and has `replicas = n / degree` copies side by
side: a grid of `replicas` by `tp_size`. Steps run inside `shard_map` over the grid, so each device
runs the step of an ordinary, smaller model, and the collectives are those that `Decoder` names.
Arrays are sharded over their first axis (the tokens of a step over their second), so that what one
device holds is what a unit of one device would hold:

| array | one device | in all | over |
|---|---|---|---|
| parameter | `[a, ...]` | `[degree * a, ...]` | the cut; the same in each copy |
| pool | `[P, rows, 128]` | `[n * P, rows, 128]` | everything; the same for every model |
| slots | `[M, ...]` | `[copies * M, ...]` | the copies |
| rows of a step | `[S, ...]` | `[copies * S, ...]` | the copies |

On one device there is no mesh, and nothing of this in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

COPY, SHARD = "copy", "shard"
"""The axes of a model's grid."""

PARAMETERS = PartitionSpec(SHARD)
POOL = PartitionSpec((COPY, SHARD))
SLOTS = ROWS = PartitionSpec(COPY)
EMITTED = PartitionSpec(None, COPY)
SAME = PartitionSpec()


@dataclass(frozen=True)
class ModelMesh:
    """The devices of a unit, as one model uses them.

    Attributes:
      devices: of the unit; every model of it has the same, in the same order.
      tp_size: devices that one copy of the model is cut for.

    Raises:
      ValueError: the degree does not divide the devices.
    """

    devices: tuple[jax.Device, ...]
    tp_size: int = 1

    def __post_init__(self) -> None:
        if not self.devices or self.tp_size < 1 or len(self.devices) % self.tp_size:
            raise ValueError(f"{len(self.devices)} devices are no grid of {self.tp_size}")

    @property
    def size(self) -> int:
        """Devices."""
        return len(self.devices)

    @property
    def replicas(self) -> int:
        return len(self.devices) // self.tp_size

    @property
    def axis(self) -> str | None:
        """The axis that a layer's sums go over; None where a model is whole."""
        return SHARD if self.tp_size > 1 else None

    @cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices).reshape(self.replicas, self.tp_size), (COPY, SHARD))

    def sharding(self, spec: PartitionSpec) -> Sharding:
        """Of arrays; on one device simply that device."""
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    @cached_property
    def local(self) -> tuple[int, ...]:
        """Indices of the devices that this process drives: all, unless there are several hosts."""
        here = jax.process_index()
        return tuple(i for i, device in enumerate(self.devices) if device.process_index == here)

    def put(self, array: np.ndarray | jax.Array, spec: PartitionSpec) -> jax.Array:
        """An array of this host on the devices; every host of the mesh gives the same."""
        sharding = self.sharding(spec)
        if len(self.local) == self.size:
            return jax.device_put(array, sharding)
        found = np.asarray(array)
        return jax.make_array_from_callback(found.shape, sharding, lambda index: found[index])

    def times(self, spec: PartitionSpec) -> int:
        """How many devices' parts the first axis of an array so sharded has."""
        return {PARAMETERS: self.tp_size, POOL: len(self.devices), ROWS: self.replicas, SAME: 1}[
            spec
        ]

    def whole(self, local: Any, spec: PartitionSpec) -> Any:
        """Shapes of whole arrays, with their sharding, from those of one device's parts."""

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = leaf.shape
            if spec != SAME:
                shape = (self.times(spec) * shape[0], *shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.sharding(spec))

        return jax.tree.map(one, local)

    def joined(self, parts: Sequence[jax.Array], spec: PartitionSpec) -> jax.Array:
        """The whole array of what lies on each device of this process, in order; nothing moves."""
        if self.size == 1:
            return parts[0]
        shape = (self.times(spec) * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding(spec), list(parts))

    def mapped(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """The function run on each device with its own parts; specs as `jax.shard_map` has them."""
        if len(self.devices) == 1:
            return function
        # Whether outputs are equal over the cut cannot be proven where tokens are sampled: every
        # device of a copy does it, from the same gathered logits.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """What is traced inside is traced for these devices, be they here or only described."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield
