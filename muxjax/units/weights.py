"""From a checkpoint to the devices: each gets its part of each parameter, straight from the file.

Where the checkpoint's format can be read in parts (safetensors, Orbax), a host holds no more of a
model than one part of one parameter, and `1 / AHEAD` of a device's bytes; otherwise one parameter.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from muxjax.models.nn.config import ModelConfig
from muxjax.models.nn.decoder import Decoder, Weight
from muxjax.models.nn.stacks import Stacks
from muxjax.models.nn.weight_format import put_on_device
from muxjax.pallas_kernels.target import current_target

if TYPE_CHECKING:
    from muxjax.units.unit_spec import ModelBuildSpec

AHEAD = 8
"""This share of a device's bytes is read ahead, of formats that are read in the background."""


def load_weights(part: ModelBuildSpec, loaded: Callable[[int], None]) -> list[Decoder]:
    """Reads a model's weights.

    Args:
      part: the model.
      loaded: told the bytes of each parameter, on one device, as it arrives.

    Returns:
      What each of the unit's devices that this process drives has of it.

    Raises:
      CheckpointError: a weight that cannot be read.
    """
    shards, mesh = part.shards, part.mesh
    devices = {at: _DeviceWeights(part, mesh.devices[at]) for at in mesh.local}
    indices = sorted({at % shards.tp_size for at in devices})
    for parameter, users, piece in _pieces(part, indices):
        for at, device in devices.items():
            if at % shards.tp_size in users:
                size = device.take(parameter, piece)
        del piece  # before the next is waited for
        if indices[-1] in users:
            loaded(size)
    return [decoder_of(part, device.weights) for device in devices.values()]


def _pieces(
    part: ModelBuildSpec, indices: list[int]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """A parameter, the cuts that keep the same of it, and that, while the next are being read."""
    shards = part.shards
    wanted = deque(
        (parameter, users)
        for parameter in shards.shapes
        for users in (
            [indices]
            if shards.segments(parameter, indices[0]) is None
            else [[at] for at in indices]
        )
    )
    reading: deque[tuple[str, list[int], int, Callable[[], np.ndarray]]] = deque()
    ahead = part.model.param_bytes // AHEAD
    while wanted or reading:
        while wanted:
            parameter, users = wanted[0]
            size = 4 * math.prod(shards.shapes[parameter])
            if reading and size + sum(one[2] for one in reading) > ahead:
                break
            wanted.popleft()
            finish = part.checkpoint.start_reading_shard(parameter, shards, users[0])
            reading.append((parameter, users, size, finish))
        parameter, users, _, finish = reading.popleft()
        piece = finish()
        del finish
        yield parameter, users, piece
        del piece


def decoder_of(part: ModelBuildSpec, weights: Mapping[str, Weight]) -> Decoder:
    """What one device has of a model."""
    shards = part.shards
    return Decoder(
        shards.local,
        weights,
        stacks_of(shards.local),
        vocab_size=shards.config.vocab_size,
        axis=part.mesh.axis,
    )


def stacks_of(config: ModelConfig) -> Stacks | None:
    """How the layers of a model are kept on the device that is traced for."""
    return Stacks.from_config(config) if current_target().platform == "tpu" else None


class _DeviceWeights:
    """What one device has of a model, as its parameters arrive.

    Args:
      part: the model.
      device: one of the unit's.
    """

    def __init__(self, part: ModelBuildSpec, device: jax.Device) -> None:
        self._model = part.model
        self._config = part.shards.local
        self._stacks = stacks_of(self._config)
        self._device = device
        self.weights: dict[str, jax.Array] = {}

    def take(self, parameter: str, part: np.ndarray) -> int:
        """Puts the device's part of a parameter there, as it is kept; returns its bytes."""
        size = 0
        for name, arrived in put_on_device(
            self._config,
            parameter,
            part,
            self._model.dtype,
            self._model.quantization,
            self._device,
        ):
            size += arrived.nbytes
            kept, index = (name, None) if self._stacks is None else self._stacks.locate(name)
            if index is None:
                self.weights[kept] = arrived
                continue
            if kept not in self.weights:
                assert self._stacks is not None, "only a stack has an index"
                shape = (self._stacks.repeats, *arrived.shape)
                self.weights[kept] = jnp.zeros(shape, arrived.dtype, device=self._device)
            self.weights[kept] = _put(self.weights[kept], arrived, index)
        return size


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, index: int) -> jax.Array:
    """Puts a layer's parameter into its stack, in place."""
    return stack.at[index].set(layer)
