"""Loads weights from a checkpoint to the devices; each device reads its shards from the file.

The host memory in use is limited. For formats that are read in parts (safetensors, Orbax), it is
one part of one parameter and `1 / READ_AHEAD` of a device's bytes; otherwise one parameter.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.decoder import Decoder, Weight
from muxjax.models.nn.stacks import Stacks
from muxjax.models.nn.weight_format import put_on_device
from muxjax.pallas_kernels.target import current_target
from muxjax.units.unit_spec import ModelBuildSpec

READ_AHEAD = 8
"""A device's bytes divided by the bytes read ahead, for formats read in the background."""


def load_weights(spec: ModelBuildSpec, on_loaded: Callable[[int], None]) -> list[Decoder]:
    """Loads a model's weights.

    Args:
      spec: of the model.
      on_loaded: called with the bytes of each parameter, on one device, when it has arrived.

    Returns:
      The part of the model for each device of the unit that belongs to this process.

    Raises:
      CheckpointError: a weight cannot be read, or a file has changed since the checkpoint was
        opened.
    """
    spec.checkpoint.files.check_unchanged()
    shards, mesh = spec.shards, spec.mesh
    devices = {index: _DeviceWeights(spec, mesh.devices[index]) for index in mesh.local_indices}
    shard_indices = sorted({index % shards.tp_size for index in devices})
    for parameter, users, part in _read_parts(spec, shard_indices):
        for index, device in devices.items():
            if index % shards.tp_size in users:
                size = device.put(parameter, part)
        del part  # freed before waiting for the next part
        if shard_indices[-1] in users:
            on_loaded(size)
    spec.checkpoint.files.check_unchanged()  # not mixed with another model meanwhile
    return [build_decoder(spec, device.weights) for device in devices.values()]


def _read_parts(
    spec: ModelBuildSpec, shard_indices: list[int]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """Yields (parameter, shards that store this part, part) while it reads the next parts."""
    shards = spec.shards
    pending = deque(
        (parameter, users)
        for parameter in shards.shapes
        for users in (
            [shard_indices]
            if shards.segments(parameter, shard_indices[0]) is None
            else [[index] for index in shard_indices]
        )
    )
    reading: deque[tuple[str, list[int], int, Callable[[], np.ndarray]]] = deque()
    read_ahead = spec.model.param_bytes // READ_AHEAD
    while pending or reading:
        while pending:
            parameter, users = pending[0]
            size = 4 * math.prod(shards.shapes[parameter])
            if reading and size + sum(entry[2] for entry in reading) > read_ahead:
                break
            pending.popleft()
            finish = spec.checkpoint.start_reading_shard(parameter, shards, users[0])
            reading.append((parameter, users, size, finish))
        parameter, users, _, finish = reading.popleft()
        part = finish()
        del finish
        yield parameter, users, part
        del part


def build_decoder(spec: ModelBuildSpec, weights: Mapping[str, Weight]) -> Decoder:
    """Returns one device's part of a model, with these weights or their shapes."""
    shards = spec.shards
    return Decoder(
        shards.local,
        weights,
        layer_stacks(shards.local),
        vocab_size=shards.config.vocab_size,
        axis=spec.mesh.axis,
    )


def layer_stacks(config: ModelConfig) -> Stacks | None:
    """Returns the stacking of a model's layers on the current target; None without stacks."""
    return Stacks.from_config(config) if current_target().platform == "tpu" else None


class _DeviceWeights:
    """Collects one device's weights while its parameters arrive.

    Args:
      spec: of the model.
      device: of the unit.

    Attributes:
      weights: arrays on the device, by name.
    """

    def __init__(self, spec: ModelBuildSpec, device: jax.Device) -> None:
        self._model = spec.model
        self._config = spec.shards.local
        self._stacks = layer_stacks(self._config)
        self._device = device
        self.weights: dict[str, jax.Array] = {}

    def put(self, parameter: str, part: np.ndarray) -> int:
        """Copies a part of a parameter to the device, in its storage format.

        Returns:
          The bytes of the part on the device.
        """
        size = 0
        for name, array in put_on_device(
            self._config,
            parameter,
            part,
            self._model.dtype,
            self._model.quantization,
            self._device,
        ):
            size += array.nbytes
            stored, index = (name, None) if self._stacks is None else self._stacks.locate(name)
            if index is None:
                self.weights[stored] = array
                continue
            if stored not in self.weights:
                assert self._stacks is not None, "only a stack has an index"
                shape = (self._stacks.repeats, *array.shape)
                self.weights[stored] = jnp.zeros(shape, array.dtype, device=self._device)
            self.weights[stored] = _set_layer(self.weights[stored], array, index)
        return size


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Writes a layer's parameter into its stack, which is donated."""
    return stack.at[index].set(layer)
