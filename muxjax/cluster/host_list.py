"""The processes of a mesh over several hosts. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.errors import ClusterError


@dataclass(frozen=True)
class Hosts:
    """The processes of one mesh, and the index of this one.

    Attributes:
      coordinator: `HOST:PORT` at which process 0 listens for `jax.distributed`.
      process: index of this process; 0 is the leader.
      count: number of processes.

    Raises:
      ClusterError: the address is not valid, or the index is out of range.
    """

    coordinator: str
    process: int
    count: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ClusterError(f"--coordinator is {self.coordinator!r}; it must be HOST:PORT")
        if not 0 <= self.process < self.count:
            raise ClusterError(
                f"--process is {self.process} of {self.count}; it must be 0 to {self.count - 1}"
            )

    @property
    def address(self) -> str:
        """Host of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")
