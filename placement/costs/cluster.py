"""Cluster descriptions such as `4x8:a100-80gb,2x4:h100`: groups of equal nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from muxjax.errors import PlanError
from muxjax.placement.costs.devices import Device, find_device

_NODE_GROUP = re.compile(r"(\d+)x(\d+):([\w.-]+)")


@dataclass(frozen=True)
class NodeGroup:
    """A group of equal nodes.

    Attributes:
      nodes: number of nodes.
      devices: devices in each node.
      device: the kind of the devices.

    Raises:
      PlanError: the group has no node or no device.
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
        """Possible mesh sizes within a node: powers of two, ascending."""
        return tuple(2**k for k in range(self.devices.bit_length()))


@dataclass(frozen=True)
class Cluster:
    """All devices that models can be placed on."""

    groups: tuple[NodeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise PlanError("a cluster needs at least one node")

    @property
    def num_devices(self) -> int:
        """Number of devices of all nodes."""
        return sum(group.nodes * group.devices for group in self.groups)

    def __str__(self) -> str:
        return ",".join(f"{g.nodes}x{g.devices}:{g.device.name}" for g in self.groups)


def parse_cluster(text: str) -> Cluster:
    """Parses `NODESxDEVICES:DEVICE`, several groups separated by commas.

    Raises:
      PlanError: an invalid format, an unknown device, or an empty cluster.
    """
    groups = []
    for part in text.split(","):
        match = _NODE_GROUP.fullmatch(part.strip())
        if match is None:
            raise PlanError(
                f"a cluster is written NODESxDEVICES:DEVICE, as in 4x8:a100-80gb, not {part!r}"
            )
        groups.append(NodeGroup(int(match[1]), int(match[2]), find_device(match[3])))
    return Cluster(tuple(groups))
