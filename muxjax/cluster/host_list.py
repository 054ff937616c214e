"""Which processes a mesh over several hosts has. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass

from muxjax.errors import ClusterError


@dataclass(frozen=True)
class Hosts:
    """The processes of one mesh, and which of them this is.

    Attributes:
      coordinator: `HOST:PORT` where the first listens for `jax.distributed`.
      process: this one's index; 0 leads.
      count: how many there are.

    Raises:
      ClusterError: not an address, or an index that does not exist.
    """

    coordinator: str
    process: int
    count: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ClusterError(f"--coordinator is {self.coordinator!r}; it must be HOST:PORT")
        if not 0 <= self.process < self.count:
            raise ClusterError(f"--process is {self.process} of {self.count}: they count from 0")

    @property
    def address(self) -> str:
        """The first process's host."""
        return self.coordinator.rpartition(":")[0].strip("[]")
