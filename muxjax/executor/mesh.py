"""The devices of a unit, arranged as a grid for each model.

A model on `n` devices is sharded over `tp_size` of them and has `replicas = n / tp_size` replicas:
a grid of `replicas` by `tp_size`. Steps run inside `shard_map` over the grid, so each device runs
the step of an ordinary, smaller model; `Decoder` contains the collectives. Arrays are sharded over
their first axis (output tokens over their second). On each device, an array has the shape that it
would have in a unit of one device:

| array | one device | global | sharded over |
|---|---|---|---|
| parameter | `[a, ...]` | `[tp_size * a, ...]` | the shards; the same in each replica |
| pool | `[P, rows, 128]` | `[n * P, rows, 128]` | all devices; the same for every model |
| slots | `[M, ...]` | `[replicas * M, ...]` | the replicas |
| rows of a step | `[S, ...]` | `[replicas * S, ...]` | the replicas |

On one device there is no mesh, and the program contains no `shard_map`.
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

REPLICA, SHARD = "replica", "shard"
"""The axes of a model's grid."""

PARAMETERS = PartitionSpec(SHARD)
POOL = PartitionSpec((REPLICA, SHARD))
SLOTS = ROWS = PartitionSpec(REPLICA)
OUTPUTS = PartitionSpec(None, REPLICA)
REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class ModelMesh:
    """The devices of a unit, as one model uses them.

    Attributes:
      devices: of the unit, the same for every model and in the same order.
      tp_size: number of devices that one replica of the model is sharded over.

    Raises:
      ValueError: `tp_size` does not divide the number of devices.
    """

    devices: tuple[jax.Device, ...]
    tp_size: int = 1

    def __post_init__(self) -> None:
        if not self.devices or self.tp_size < 1 or len(self.devices) % self.tp_size:
            raise ValueError(
                f"tp_size is {self.tp_size}; it must divide the {len(self.devices)} devices"
            )

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.devices)

    @property
    def replicas(self) -> int:
        """Number of replicas of the model."""
        return len(self.devices) // self.tp_size

    @property
    def axis(self) -> str | None:
        """The mesh axis that a layer sums over; None for a model that is not sharded."""
        return SHARD if self.tp_size > 1 else None

    @cached_property
    def mesh(self) -> Mesh:
        """The grid, `replicas` by `tp_size`."""
        return Mesh(np.array(self.devices).reshape(self.replicas, self.tp_size), (REPLICA, SHARD))

    def sharding(self, spec: PartitionSpec) -> Sharding:
        """Returns the sharding of arrays with this spec; on one device, that device."""
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    @cached_property
    def local_indices(self) -> tuple[int, ...]:
        """Indices of the devices that this process drives: all of them on a single host."""
        process = jax.process_index()
        return tuple(i for i, device in enumerate(self.devices) if device.process_index == process)

    def put(self, array: np.ndarray | jax.Array, spec: PartitionSpec) -> jax.Array:
        """Copies a global array of this host to the devices.

        On a mesh over several hosts every host must pass the same array.
        """
        sharding = self.sharding(spec)
        if len(self.local_indices) == self.size:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def num_shards(self, spec: PartitionSpec) -> int:
        """Returns the number of shards of the first axis of an array with this spec."""
        return {
            PARAMETERS: self.tp_size,
            POOL: len(self.devices),
            ROWS: self.replicas,
            REPLICATED: 1,
        }[spec]

    def global_shapes(self, local: Any, spec: PartitionSpec) -> Any:
        """Returns the global shapes, with their sharding, of a pytree of one device's shapes."""

        def global_shape(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = leaf.shape
            if spec != REPLICATED:
                shape = (self.num_shards(spec) * shape[0], *shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.sharding(spec))

        return jax.tree.map(global_shape, local)

    def assemble(self, shards: Sequence[jax.Array], spec: PartitionSpec) -> jax.Array:
        """Assembles a global array from the shards on this process's devices, without copying.

        Args:
          shards: one for each of `local_indices`, in that order, already on its device.
          spec: how the global array is sharded.
        """
        if self.size == 1:
            return shards[0]
        shape = (self.num_shards(spec) * shards[0].shape[0], *shards[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding(spec), list(shards))

    def shard_map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Returns the function run on each device with its shards; specs as for `jax.shard_map`.

        On one device that is the function itself.
        """
        if len(self.devices) == 1:
            return function
        # JAX cannot prove that sampled tokens are equal over the shards of a replica: every shard
        # samples them from the same gathered logits.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Context in which functions are traced for these devices, which may be absent."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            yield
