"""A fleet whose units are processes that Ray starts on the machines of its cluster.

The plan's nodes become the bundles of one placement group. A bundle is a number of devices of one
machine, and Ray spreads the bundles over the machines. When a machine is lost, Ray moves its bundle
to a machine with enough free devices, and the router restarts the bundle's units there.
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

from muxjax.cluster.fixed_models import check_models_stay_awake
from muxjax.cluster.remote_unit import RemoteUnit
from muxjax.config.fleet_file import FleetConfig, load_fleet_config
from muxjax.errors import ClusterError
from muxjax.fleet import Fleet
from muxjax.placement.planner.plan import PlacementPlan, load_plan
from muxjax.scheduling.routing import PlannedLoad
from muxjax.units.planned_units import check_plan

try:
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
except ImportError as _error:
    raise ClusterError("Ray is not installed: pip install 'muxjax[ray]'") from _error

from muxjax.cluster.ray_peer import ActorPlacement, connect

RESERVE_TIMEOUT = 60.0
"""Maximum seconds for Ray to reserve the devices."""
_RESOURCES = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}

log = logging.getLogger(__name__)


@contextmanager
def ray_fleet(
    source: FleetConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    plan: PlacementPlan | str | os.PathLike[str] | None = None,
    address: str = "auto",
) -> Iterator[Fleet]:
    """Serves a fleet on a Ray cluster; ends its processes and leaves the cluster on exit.

    Args:
      source: the fleet file, as for `Fleet.load`. Every machine must have MuxJAX and be able to
        read the models' sources.
      plan: the units, from `muxjax plan`; None serves all models as one unit.
      address: `HOST:PORT` of the cluster, `auto` for the cluster of this machine, or `local` to
        start Ray on this machine for the lifetime of the fleet.

    Raises:
      ClusterError: there is no such cluster, or it has too few devices.
      MuxError: as `Fleet.load`.
    """
    config = load_fleet_config(source)
    check_models_stay_awake(config)
    if plan is not None and not isinstance(plan, PlacementPlan):
        plan = load_plan(Path(plan))
    if plan is not None:
        check_plan(config, plan)
    with ExitStack() as stack:
        if not ray.is_initialized():
            _join(address)
            stack.callback(ray.shutdown)
        placements, group = _reserve_devices(config, plan)
        stack.callback(remove_placement_group, group)
        models = {"0": [entry.name for entry in config.models]}
        loads = {"0": PlannedLoad()}
        if plan is not None:
            units_with_models = [unit for unit in plan.units if unit.models]
            models = {unit.name: [m.name for m in unit.models] for unit in units_with_models}
            loads = {unit.name: unit.planned_load for unit in units_with_models}
        with ThreadPoolExecutor(len(placements), thread_name_prefix="muxjax-start") as pool:
            units = pool.map(
                lambda name: RemoteUnit(
                    name,
                    models[name],
                    loads[name],
                    partial(connect, placements[name], config, plan, name),
                ),
                placements,
            )
            fleet = Fleet(list(units))
        stack.callback(fleet.close)
        yield fleet


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage data by default
    options: dict[str, Any] = {"address": address}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(**options, namespace="muxjax", logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}") from error


def _reserve_devices(
    config: FleetConfig, plan: PlacementPlan | None
) -> tuple[dict[str, ActorPlacement], PlacementGroup]:
    """Reserves the devices of all units.

    Raises:
      ClusterError: the cluster does not have enough free devices within `RESERVE_TIMEOUT`.
    """
    resources = ray.cluster_resources()
    platform = next((name for name in ("tpu", "gpu") if _RESOURCES[name] in resources), "cpu")
    if plan is None:
        sizes = {"0": (0, config.tensor_parallel)}
    else:
        units = [unit for unit in plan.units if unit.models]
        sizes = {unit.name: (unit.node, unit.size) for unit in units}
        if all(unit.device == "cpu" for unit in units):
            platform = "cpu"
    nodes = sorted({node for node, _ in sizes.values()})
    counts = [sum(size for n, size in sizes.values() if n == node) for node in nodes]
    resource = _RESOURCES[platform]
    group = placement_group([{resource: float(count)} for count in counts], strategy="SPREAD")
    if not group.wait(RESERVE_TIMEOUT):
        remove_placement_group(group)
        free = ray.available_resources().get(resource, 0)
        raise ClusterError(
            f"the plan needs machines with {', '.join(map(str, counts))} devices ({resource}); "
            f"Ray's cluster has {resources.get(resource, 0):g}; {free:g} are free"
        )
    placements = {
        name: ActorPlacement(platform, size, group, nodes.index(node))
        for name, (node, size) in sizes.items()
    }
    return placements, group
