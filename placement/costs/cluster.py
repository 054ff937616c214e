"""The cluster: nodes of equal devices, possibly of several kinds. `4x8:a100-80gb,2x4:h100`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from muxjax.errors import PlanError
from muxjax.placement.costs.devices import Device, find_device

_PART = re.compile(r"(\d+)x(\d+):([\w.-]+)")


@dataclass(frozen=True)
class NodeGroup:
    """Some nodes that are alike.

    Attributes:
      nodes: how many.
      devices: devices in each.
      device: their kind.
    """

    nodes: int
    devices: int
    device: Device

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.devices < 1:
            raise PlanError(
                f"a cluster needs at least one node and one device, not {self.nodes}x{self.devices}"
            )

    def mesh_sizes(self) -> tuple[int, ...]:
        """Sizes of a mesh on such a node: powers of two, ascending."""
        return tuple(2**k for k in range(self.devices.bit_length()))


@dataclass(frozen=True)
class Cluster:
    """All devices that there are."""

    groups: tuple[NodeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise PlanError("a cluster needs at least one node")

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return sum(group.nodes * group.devices for group in self.groups)

    def __str__(self) -> str:
        return ",".join(f"{g.nodes}x{g.devices}:{g.device.name}" for g in self.groups)


def parse_cluster(text: str) -> Cluster:
    """A cluster from `NODESxDEVICES:DEVICE`, several separated by commas.

    Raises:
      PlanError: another form, an unknown device, or none at all.
    """
    groups = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise PlanError(
                f"a cluster is written NODESxDEVICES:DEVICE, as in 4x8:a100-80gb, not {part!r}"
            )
        groups.append(NodeGroup(int(match[1]), int(match[2]), find_device(match[3])))
    return Cluster(tuple(groups))
