"""A fleet whose units are processes that Ray starts, on as many machines as its cluster has.

The plan's nodes become the bundles of one placement group: a bundle is so many devices of one
machine, and Ray spreads the bundles over the machines. When a machine is lost, Ray moves its bundle
to one that has as many free devices, and the router starts the bundle's units there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from muxjax.cluster.fixed_models import check_fixed
from muxjax.cluster.remote_unit import RemoteUnit
from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.errors import ClusterError
from muxjax.fleet import Fleet
from muxjax.placement.planner.plan import PlacementPlan, load_plan
from muxjax.units.planned_units import check_plan

try:
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
except ImportError as _error:
    raise ClusterError("Ray is not installed: pip install 'muxjax[ray]'") from _error

from muxjax.cluster.ray_peer import ActorPlacement, connect

PLACE_SECONDS = 60.0
"""Most seconds that Ray may take to reserve the devices."""
_RESOURCES = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}

log = logging.getLogger(__name__)


@contextmanager
def ray_fleet(
    source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    plan: PlacementPlan | str | os.PathLike[str] | None = None,
    address: str = "auto",
) -> Iterator[Fleet]:
    """Serves a fleet on a Ray cluster; ends its processes and leaves the cluster afterwards.

    Args:
      source: the fleet file, as for `Fleet.load`. Sources of models must be readable on every
        machine, and MuxJAX be installed there.
      plan: which units there are, from `muxjax plan`; without one all models are one unit.
      address: `HOST:PORT` of the cluster, `auto` for the one that this machine belongs to, or
        `local` to start Ray here for as long as the fleet lives.

    Raises:
      ClusterError: Ray is not there, or its cluster has too few devices.
      MuxError: as `Fleet.load`.
    """
    config = load_fleet_config(source)
    check_fixed(config)
    if plan is not None and not isinstance(plan, PlacementPlan):
        plan = load_plan(Path(plan))
    if plan is not None:
        check_plan(config, plan)
    with ExitStack() as stack:
        if not ray.is_initialized():
            _join(address)
            stack.callback(ray.shutdown)
        places, group = _places(config, plan)
        stack.callback(remove_placement_group, group)
        seconds = {"0": {entry.name: 1.0 for entry in config.models}}
        if plan is not None:
            seconds = {unit.name: unit.token_seconds for unit in plan.units if unit.models}
        with ThreadPoolExecutor(len(places), thread_name_prefix="muxjax-start") as starting:
            units = starting.map(
                lambda name: RemoteUnit(
                    name, seconds[name], partial(connect, places[name], config, plan, name)
                ),
                places,
            )
            fleet = Fleet(list(units))
        stack.callback(fleet.close)
        yield fleet


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers unless it is told
    options: dict[str, Any] = {"address": address}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(**options, namespace="muxjax", logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}") from error


def _places(
    config: FleetConfig, plan: PlacementPlan | None
) -> tuple[dict[str, ActorPlacement], PlacementGroup]:
    """Reserves the devices of all units.

    Raises:
      ClusterError: the cluster has not as many, or not in time.
    """
    there = ray.cluster_resources()
    platform = next((name for name in ("tpu", "gpu") if _RESOURCES[name] in there), "cpu")
    if plan is None:
        sizes = {"0": (0, config.tensor_parallel)}
    else:
        units = [unit for unit in plan.units if unit.models]
        sizes = {unit.name: (unit.node, unit.size) for unit in units}
        if all(unit.device == "cpu" for unit in units):
            platform = "cpu"
    nodes = sorted({node for node, _ in sizes.values()})
    wanted = [sum(size for at, size in sizes.values() if at == node) for node in nodes]
    resource = _RESOURCES[platform]
    group = placement_group([{resource: float(count)} for count in wanted], strategy="SPREAD")
    if not group.wait(PLACE_SECONDS):
        remove_placement_group(group)
        free = ray.available_resources().get(resource, 0)
        raise ClusterError(
            f"the plan needs machines with {', '.join(map(str, wanted))} devices ({resource}); "
            f"Ray's cluster has {there.get(resource, 0):g}, {free:g} of them free"
        )
    places = {
        name: ActorPlacement(platform, size, group, nodes.index(node))
        for name, (node, size) in sizes.items()
    }
    return places, group
