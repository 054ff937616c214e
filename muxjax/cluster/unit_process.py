"""The process of one unit: configures its devices, and loads the unit."""

from __future__ import annotations

import os

import jax

from muxjax.cluster.unit_host import UnitHost
from muxjax.config.fleet_file import FleetConfig
from muxjax.executor.compilation_cache import enable_compilation_cache
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.units.build import build_unit
from muxjax.units.build_unit_spec import build_unit_spec
from muxjax.units.planned_units import planned_unit_config, single_unit_config


def configure_devices(platform: str, count: int) -> None:
    """Splits a CPU into devices. Must be called before JAX initializes its backends.

    Accelerators are selected by the process that starts this one (Ray sets `CUDA_VISIBLE_DEVICES`
    and `TPU_VISIBLE_CHIPS`).

    Args:
      platform: 'cpu', 'gpu' or 'tpu'.
      count: number of devices.
    """
    if platform == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
        # Setting JAX_PLATFORMS would be too late: JAX reads it when it is imported.
        jax.config.update("jax_platforms", "cpu")


def load_unit_host(config: FleetConfig, plan: PlacementPlan | None, name: str) -> UnitHost:
    """Loads a unit in this process.

    Args:
      config: of the fleet.
      plan: checked with `check_plan`; None if the whole fleet is one unit.
      name: of the unit.

    Raises:
      MuxError: as `Fleet.load`.
    """
    enable_compilation_cache()
    if plan is None:
        planned = single_unit_config(config)
    else:
        unit = next(unit for unit in plan.units if unit.name == name)
        planned = planned_unit_config(config, plan, unit, tuple(jax.devices()[: unit.size]))
    spec = build_unit_spec(
        planned.config, progress=False, devices=planned.devices, demand=planned.demand
    )
    local = build_unit(spec, name)
    return UnitHost(local, local.models, local.stats)
