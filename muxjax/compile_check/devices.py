"""Descriptions of devices that are not present, for which the real compilers compile programs.

JAX calls this deviceless ahead-of-time compilation. Programs can be lowered and compiled for the
devices of `describe_devices`, and the compiler reports their memory use. They cannot be executed.
Functions must be traced inside `DescribedDevices.tracing`: code that depends on the device then
uses the described one (`pallas_kernels.target`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from muxjax.compile_check.gpu_targets import GPU_TARGETS
from muxjax.compile_check.targets import TargetUnavailable, parse_gpus

_GIB = 1 << 30
_MEMORY_BYTES = {
    "TPU v4": 32 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v6 lite": 32 * _GIB,
    "TPU7x": 96 * _GIB,
    "NVIDIA H100 80GB HBM3": 80 * 10**9,
    "NVIDIA H200": 141 * 10**9,
}
"""Bytes of one device by JAX's device kind (cloud.google.com/tpu/docs, nvidia.com). A TPU7x
chip has 192 GiB and appears as two devices."""


@dataclass(frozen=True)
class DescribedDevices:
    """Devices to compile for, all of the same kind.

    Attributes:
      target: as requested, such as `v5e:2x2`.
      devices: of the target.
      memory_bytes: of each device; None if it is not known.
    """

    target: str
    devices: tuple[jax.Device, ...]
    memory_bytes: int | None

    def first(self, count: int) -> tuple[jax.Device, ...]:
        """Returns the first `count` devices.

        Raises:
          TargetUnavailable: the target has fewer.
        """
        if count > len(self.devices):
            raise TargetUnavailable(
                f"the fleet's tensor_parallel is {count}, and {self.target} has "
                f"{len(self.devices)} devices: choose a larger target, such as v5e:2x4, or 8xh100"
            )
        return self.devices[:count]

    @property
    def device_kind(self) -> str:
        """JAX's name of the device kind."""
        return self.devices[0].device_kind

    @property
    def sharding(self) -> Sharding:
        """The sharding of an array on the first device."""
        return SingleDeviceSharding(self.devices[0])

    @contextmanager
    def tracing(self, count: int = 1) -> Iterator[None]:
        """Traces functions for the first `count` devices."""
        mesh = Mesh(np.array(self.devices[:count]), ("device",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def describe_devices(target: str) -> DescribedDevices:
    """Returns the devices of a target. Call `set_environment` first.

    Raises:
      TargetUnavailable: its compiler is not installed, or does not know the target.
    """
    gpus = parse_gpus(target)
    try:
        if gpus is not None:
            count, kind = gpus
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=GPU_TARGETS[kind], topology=f"1x1x{count}"
            )
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        extra = "tpu" if gpus is None else "aot-cuda"
        reason = str(error).strip().splitlines()[0]
        raise TargetUnavailable(
            f"cannot compile for {target}: {reason}\ninstall its compiler with "
            f"`pip install 'muxjax[{extra}]'`"
        ) from error
    devices: Any = topology.devices
    return DescribedDevices(target, tuple(devices), _MEMORY_BYTES.get(devices[0].device_kind))
