"""Loads a fleet in this process, on Ray, or on a mesh of several hosts."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from muxjax.cluster.host_list import Hosts
from muxjax.config.fleet_file import FleetConfig
from muxjax.fleet import Fleet


def load_fleet(
    config: FleetConfig, *, plan: Path | None, ray_address: str | None, hosts: Hosts | None
) -> AbstractContextManager[Fleet]:
    """Returns a loaded fleet.

    Args:
      config: the fleet file.
      plan: a placement plan (JSON); None serves all models as one unit.
      ray_address: address of a Ray cluster that runs the units; None runs them in this process.
      hosts: the processes of a mesh over several hosts; this process must be the first. None for
        any other fleet.
    """
    if hosts is not None:
        from muxjax.cluster.leader import lead_fleet

        return lead_fleet(config, hosts)
    if ray_address is not None:
        # Ray is an optional dependency.
        from muxjax.cluster.ray_fleet import ray_fleet

        return ray_fleet(config, plan=plan, address=ray_address)
    return Fleet.load(config, plan=plan)
