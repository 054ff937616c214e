"""Devices by name, such as `a100-80gb`: peak rates and memory as published by their vendors."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from muxjax.errors import PlanError

_GB = 1e9
_GIB = 2.0**30
_GPU_LAUNCH = 4e-6
_TPU_LAUNCH = 2e-6


@dataclass(frozen=True)
class Device:
    """One accelerator (for a TPU one chip).

    Attributes:
      name: its name in a cluster description.
      flops: peak dense operations per second in bfloat16 (float32 on a CPU).
      bandwidth: bytes per second from its memory.
      memory: bytes of its memory.
      link_bandwidth: bytes per second to the other devices of its node, sum of both directions.
      launch_seconds: time to start one kernel (an assumption).
      source: publication of the other values.

    Raises:
      PlanError: a value that is not positive and finite.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link_bandwidth: float
    launch_seconds: float
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "memory", "link_bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise PlanError(f"device {self.name}: {field} must be above 0, not {value}")
        if not (math.isfinite(self.launch_seconds) and self.launch_seconds >= 0):
            raise PlanError(f"device {self.name}: launch_seconds must not be negative")


def _gpu(
    name: str, tflops: float, gbps: float, gigabytes: float, link: float, source: str
) -> Device:
    return Device(name, tflops * 1e12, gbps * _GB, gigabytes * _GB, link * _GB, _GPU_LAUNCH, source)


def _tpu(name: str, tflops: float, gbps: float, gibibytes: float, ici: float, page: str) -> Device:
    source = f"Google Cloud documentation, docs.cloud.google.com/tpu/docs/{page} (2026)"
    return Device(name, tflops * 1e12, gbps * _GB, gibibytes * _GIB, ici * _GB, _TPU_LAUNCH, source)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100-40gb", 312, 1555, 40, 600, "NVIDIA A100 datasheet, SXM4 40 GB (2020)"),
        _gpu("a100-80gb", 312, 2039, 80, 600, "NVIDIA A100 datasheet, SXM4 80 GB (2021)"),
        _gpu("h100", 989.4, 3350, 80, 900, "NVIDIA H100 datasheet, SXM5, without sparsity (2023)"),
        _gpu("h200", 989.4, 4800, 141, 900, "NVIDIA H200 datasheet, SXM, without sparsity (2024)"),
        _tpu("v5e", 197, 819, 16, 400, "v5e"),
        _tpu("v5p", 459, 2765, 95, 1200, "tpu7x"),
        _tpu("v6e", 918, 1638, 32, 800, "tpu7x"),
        _tpu("tpu7x", 2307, 7380, 192, 1200, "tpu7x"),
    )
}
"""Presets by name. One table, on the page of TPU7x, gives the data of v5p, v6e and tpu7x."""

_CORE_FLOPS = 60e9
"""Operations per second and core; measured, see docs/measurements/placement-notes.md."""
_CPU_BANDWIDTH = 31e9
"""Bytes per second; measured, see docs/measurements/placement-notes.md."""


def local_cpu() -> Device:
    """The local machine as one device.

    The memory is read from the system. The rates were measured on two cores of an AMD EPYC (Zen 4)
    and are a rough estimate for other machines.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return Device(
        "cpu",
        _CORE_FLOPS * cores,
        _CPU_BANDWIDTH,
        float(memory),
        _CPU_BANDWIDTH,
        1e-5,
        "this machine's memory; rates of two cores of an AMD EPYC (Zen 4)",
    )


def find_device(name: str) -> Device:
    """Finds a preset by name; `cpu` is the local machine.

    Raises:
      PlanError: an unknown device; the message lists the known ones.
    """
    if name == "cpu":
        return local_cpu()
    if name in DEVICES:
        return DEVICES[name]
    known = [*DEVICES, "cpu"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise PlanError(f"unknown device {name!r}; {hint}Known devices: {', '.join(known)}")
