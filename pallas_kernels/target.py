"""The device that a function is traced for: a device of the machine, or a described one.

To compile for an absent device, `muxjax compile-check` traces under that device's abstract mesh.
Code that differs between devices must therefore use only `current_target` to distinguish them. JAX
keys its caches of traced functions by the mesh, so a layer traced for one device is never reused
for another.
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
      device_kind: the vendor's name, such as 'TPU v5 lite' or 'NVIDIA H200'.
    """

    platform: str
    device_kind: str

    def __str__(self) -> str:
        return self.platform if self.platform == self.device_kind else self.device_kind


def current_target() -> KernelTarget:
    """The device of the current abstract mesh, or else JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    platform = "gpu" if device.platform in _GPU else device.platform
    return KernelTarget(platform, device.device_kind)
