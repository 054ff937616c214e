"""What a process that was started for one unit does: makes its devices, loads it, serves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from muxjax.config.fleet_file import FleetConfig
from muxjax.placement.planner.plan import PlacementPlan

if TYPE_CHECKING:
    from muxjax.cluster.unit_host import UnitHost


def prepare_devices(platform: str, count: int) -> None:
    """Makes JAX see what the unit runs on: a CPU as so many devices. Before JAX's first use.

    Accelerators are chosen by whoever started the process (Ray sets `CUDA_VISIBLE_DEVICES` and
    `TPU_VISIBLE_CHIPS`).
    """
    if platform == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
        os.environ["JAX_PLATFORMS"] = "cpu"


def load_host(config: FleetConfig, plan: PlacementPlan | None, name: str) -> UnitHost:
    """Loads the unit.

    Args:
      config: of the fleet.
      plan: one that `check_plan` lets pass, or None if the whole fleet is one unit.
      name: the unit's.

    Raises:
      MuxError: as `Fleet.load`.
    """
    import jax

    from muxjax.cluster.unit_host import UnitHost
    from muxjax.scheduling.demand import expected_demand
    from muxjax.units import build as loading
    from muxjax.units.local_unit import LocalUnit
    from muxjax.units.planned_units import UnitPart, unit_part

    loading.enable_compilation_cache()
    if plan is None:
        part = UnitPart(name, config, loading.unit_devices(config), expected_demand, {})
    else:
        unit = next(unit for unit in plan.units if unit.name == name)
        part = unit_part(config, plan, unit, tuple(jax.devices()[: unit.size]))
    made = loading.build_unit_spec(
        part.config, progress=False, devices=part.devices, demand=part.demand
    )
    programs = loading.make_programs(made)
    loading.load_and_compile(
        made.parts, programs, loaded=lambda name, size: None, compiled=lambda program: None
    )
    live = LocalUnit(part.name, made, programs)
    return UnitHost(live, live.models, live.stats)
