"""Devices that are described, not present: compiling for them by their real compilers.

JAX calls this deviceless ahead-of-time compilation. `describe` gives devices that programs can be
lowered for and compiled, with the compiler's own account of memory, and that can run nothing.
Functions must be traced inside `tracing()`, so that what differs between devices follows the
described one (`pallas_kernels.target`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muxjax.compile_check.gpu_targets import GPU_TARGETS
from muxjax.errors import MuxError

if TYPE_CHECKING:
    import jax

_TPU = re.compile(r"(v[2-9][a-z]*|tpu7x):\d+x\d+(x\d+)?")
_GPUS = re.compile(r"(?:([1-9]\d*)x)?(\w+)")
_GIB = 1 << 30
_MEMORY = {
    "TPU v4": 32 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v6 lite": 32 * _GIB,
    "TPU7x": 96 * _GIB,
    "NVIDIA H100 80GB HBM3": 80 * 10**9,
    "NVIDIA H200": 141 * 10**9,
}
"""Bytes of one device by the name that JAX gives its kind (cloud.google.com/tpu/docs, nvidia.com).
A TPU7x chip has 192 GiB and is two devices."""


class TargetUnavailable(MuxError):
    """A target that is not known, or whose compiler is not installed."""


@dataclass(frozen=True)
class DescribedDevices:
    """Devices to compile for, all of one kind.

    Attributes:
      target: as it was asked for, such as `v5e:2x2`.
      devices: all that the target has.
      memory_bytes: of each; None where that is not known.
    """

    target: str
    devices: tuple[jax.Device, ...]
    memory_bytes: int | None

    def first(self, count: int) -> tuple[jax.Device, ...]:
        """So many of them.

        Raises:
          TargetUnavailable: there are fewer.
        """
        if count > len(self.devices):
            raise TargetUnavailable(
                f"the fleet's tensor_parallel is {count}, and {self.target} has "
                f"{len(self.devices)} devices: choose a larger target, such as v5e:2x4, or 8xh100"
            )
        return self.devices[:count]

    @property
    def device_kind(self) -> str:
        """Their maker's name for them."""
        return self.devices[0].device_kind

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Puts whole arrays on the first."""
        from jax.sharding import SingleDeviceSharding

        return SingleDeviceSharding(self.devices[0])

    @contextmanager
    def tracing(self, count: int = 1) -> Iterator[None]:
        """What is traced inside is traced for such devices, so many of them."""
        import jax
        import numpy as np

        mesh = jax.sharding.Mesh(np.array(self.devices[:count]), ("device",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def set_environment(target: str) -> None:
    """Tells JAX and the compilers, before JAX is first used, that there is no device to look for.

    Raises:
      TargetUnavailable: the target is not known.
    """
    # JAX would look for the libraries of a GPU that is not there, and say so, for any target.
    wanted = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    if _TPU.fullmatch(target):
        # libtpu otherwise asks the cloud's metadata server what it runs on, and locks the chip.
        wanted |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
            "TPU_ACCELERATOR_TYPE": "v5litepod-1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    elif _gpu(target) is not None:
        wanted |= {"JAX_PLATFORMS": "cpu,cuda"}
    else:
        raise TargetUnavailable(
            f"no target {target!r}: a TPU slice such as v5e:2x2, v6e:2x2, v5p:2x2x1 or "
            f"tpu7x:2x2x1, or one of {', '.join(GPU_TARGETS)}, several as 8xh100"
        )
    os.environ.update(wanted)


def _gpu(target: str) -> tuple[int, str] | None:
    """How many GPUs of which kind: `h100`, or `8xh100` for those of one machine."""
    match = _GPUS.fullmatch(target)
    if match is None or match[2] not in GPU_TARGETS:
        return None
    return int(match[1] or 1), match[2]


def describe(target: str) -> DescribedDevices:
    """The devices of the target.

    Raises:
      TargetUnavailable: its compiler is not installed or does not know it.
    """
    from jax.experimental import topologies

    gpu = _gpu(target)
    try:
        if gpu is not None:
            count, kind = gpu
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=GPU_TARGETS[kind], topology=f"1x1x{count}"
            )
        else:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        extra = "tpu" if gpu is None else "aot-cuda"
        first = str(error).strip().splitlines()[0]
        raise TargetUnavailable(
            f"cannot compile for {target}: {first}\nits compiler comes with "
            f"`pip install 'muxjax[{extra}]'`"
        ) from error
    devices: Any = topology.devices
    return DescribedDevices(target, tuple(devices), _MEMORY.get(devices[0].device_kind))
