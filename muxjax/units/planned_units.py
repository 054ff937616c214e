"""Splits a fleet into the units of a placement plan, on the devices that are present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.planner.plan import PlacementPlan, PlannedUnit
from muxjax.scheduling.demand import DemandFunction, expected_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.routing import PlannedLoad
from muxjax.scheduling.specs import Demand, ModelSpec
from muxjax.units.build_unit_spec import unit_devices


@dataclass(frozen=True)
class PlannedUnitConfig:
    """The configuration of one unit of a plan.

    Attributes:
      name: in the plan.
      config: a fleet file with only its models, their share of the load, and their floors.
      devices: of the unit.
      demand: planned demand of the models, for the initial quotas.
      planned_load: what the plan expects of the unit.
    """

    name: str
    config: FleetConfig
    devices: tuple[jax.Device, ...]
    demand: DemandFunction
    planned_load: PlannedLoad


def single_unit_config(config: FleetConfig) -> PlannedUnitConfig:
    """Returns the configuration of a fleet without a plan, which is one unit.

    Raises:
      FleetConfigError: JAX has fewer devices than `tensor_parallel`.
    """
    return PlannedUnitConfig("0", config, unit_devices(config), expected_demand, PlannedLoad())


def split_by_plan(
    config: FleetConfig, plan: PlacementPlan, devices: Sequence[jax.Device]
) -> list[PlannedUnitConfig]:
    """Splits a fleet into the units of a plan.

    Args:
      config: the fleet file; without `tensor_parallel` keys, which the plan contains.
      plan: the devices of its nodes are numbered in order; device `i` is `devices[i]`.
      devices: all devices.

    Raises:
      PlanError: the plan is for other models, or for more devices than there are.
      FleetConfigError: the fleet file contradicts the plan.
    """
    check_plan(config, plan)
    return [
        planned_unit_config(config, plan, unit, _unit_devices(plan, unit, devices))
        for unit in plan.units
        if unit.models
    ]


def check_plan(config: FleetConfig, plan: PlacementPlan) -> None:
    """Checks that a plan is for the models of a fleet file.

    Raises:
      PlanError: the plan is for other models.
      FleetConfigError: the fleet file contradicts the plan.
    """
    if config.tensor_parallel > 1 or any(entry.tensor_parallel for entry in config.models):
        raise FleetConfigError(
            "tensor_parallel: a plan sets the number of devices of each model: remove the key, "
            "or serve without the plan"
        )
    names = {entry.name for entry in config.models}
    planned = {model.name for unit in plan.units for model in unit.models}
    if missing := [entry.name for entry in config.models if entry.name not in planned]:
        raise PlanError(
            f"the plan does not place {', '.join(missing)}: update it with `muxjax plan`"
        )
    if unknown := sorted(planned - names):
        raise PlanError(
            f"the plan places {', '.join(unknown)}, which the fleet file does not have: update it "
            "with `muxjax plan`"
        )


def planned_unit_config(
    config: FleetConfig, plan: PlacementPlan, unit: PlannedUnit, devices: tuple[jax.Device, ...]
) -> PlannedUnitConfig:
    """Returns the configuration of one unit.

    Args:
      config: of the fleet.
      plan: checked with `check_plan`.
      unit: of the plan.
      devices: of the unit.
    """
    return PlannedUnitConfig(
        name=unit.name,
        config=_unit_fleet_config(config, unit, sum(other.size for other in plan.units)),
        devices=devices,
        demand=_planned_demand(unit),
        planned_load=unit.planned_load,
    )


def _unit_devices(
    plan: PlacementPlan, unit: PlannedUnit, devices: Sequence[jax.Device]
) -> tuple[jax.Device, ...]:
    first = 0
    for node in [group for group in plan.cluster for _ in range(group.nodes)][: unit.node]:
        first += node.devices
    last = first + max(unit.devices)
    if last >= len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = (
                f"; to split a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={last + 1}"
            )
        raise PlanError(
            f"unit {unit.name} of the plan is on device {last + 1} of its cluster, and JAX sees "
            f"{len(devices)} ({devices[0].device_kind}){hint}"
        )
    return tuple(devices[first + index] for index in unit.devices)


def _unit_fleet_config(config: FleetConfig, unit: PlannedUnit, num_devices: int) -> FleetConfig:
    """Returns the fleet file of a unit. `pool.memory`, if given, is divided among the devices."""
    entries = {entry.name: entry for entry in config.models}
    memory = int(unit.kv_bytes * unit.size)
    if config.pool.memory is not None:
        memory = config.pool.memory * unit.size // num_devices
    models = tuple(
        entries[model.name].model_copy(
            update={
                "rate": model.rate or entries[model.name].rate,
                "prompt_tokens": model.prompt_tokens or entries[model.name].prompt_tokens,
                "output_tokens": model.output_tokens or entries[model.name].output_tokens,
                "kv_floor": model.kv_floor,
                "tensor_parallel": model.tp,
            }
        )
        for model in unit.models
    )
    return config.model_copy(
        update={
            "models": models,
            "tensor_parallel": unit.size,
            "pool": config.pool.model_copy(update={"memory": memory}),
        }
    )


def _planned_demand(unit: PlannedUnit) -> DemandFunction:
    """Returns the planned demand; values missing from the plan are estimated from the load."""
    models = {model.name: model for model in unit.models}
    with_kv = any(model.kv_quota for model in unit.models)
    with_time = any(model.prefill_time or model.decode_time for model in unit.models)

    def demand(specs: Sequence[ModelSpec], estimates: StepEstimates) -> dict[str, Demand]:
        demands = {}
        for name, expected in expected_demand(specs, estimates).items():
            planned = models[name]
            demands[name] = Demand(
                kv=planned.kv_quota if with_kv else expected.kv,
                prefill_seconds=planned.prefill_time if with_time else expected.prefill_seconds,
                decode_seconds=planned.decode_time if with_time else expected.decode_seconds,
            )
        return demands

    return demand
