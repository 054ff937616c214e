"""Which device a function is being traced for: the machine's own, or one that is only described.

Compiling for a device that is not here (`muxjax compile-check`) traces under the abstract mesh of
that device, so this, and nothing but this, is what code asks that must differ between devices.
JAX keys its caches of traced functions by the mesh, so that a layer traced for one device is never
reused for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

_GPU = ("cuda", "rocm")


@dataclass(frozen=True)
class KernelTarget:
    """A kind of device.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      device_kind: the maker's name for it, such as 'TPU v5 lite' or 'NVIDIA H200'.
    """

    platform: str
    device_kind: str

    def __str__(self) -> str:
        return self.platform if self.platform == self.device_kind else self.device_kind


def current_target() -> KernelTarget:
    """The device of the mesh in whose context this is traced, or else JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    platform = "gpu" if device.platform in _GPU else device.platform
    return KernelTarget(platform, device.device_kind)
