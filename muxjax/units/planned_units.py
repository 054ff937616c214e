"""From a plan to units on the devices that exist: who is where, with which share of what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from muxjax.config.fleet_file import FleetConfig
from muxjax.errors import FleetConfigError, PlanError
from muxjax.placement.planner.plan import PlacementPlan, PlannedUnit
from muxjax.scheduling.demand import expected_demand
from muxjax.scheduling.estimates import StepEstimates
from muxjax.scheduling.specs import Demand, ModelSpec


@dataclass(frozen=True)
class UnitPart:
    """What one unit is to be made of.

    Attributes:
      name: in the plan.
      config: a fleet file of its models alone, with their parts of the load and their floors.
      devices: where it runs.
      demand: what its models need, as planned: quotas start from it.
      seconds: of each model: for each token of a request, from first to last, as planned.
    """

    name: str
    config: FleetConfig
    devices: tuple[jax.Device, ...]
    demand: Callable[[ModelSpec, StepEstimates], Demand]
    seconds: dict[str, float]


def planned_units(
    config: FleetConfig, plan: PlacementPlan, devices: Sequence[jax.Device]
) -> list[UnitPart]:
    """Cuts a fleet into the units of a plan.

    Args:
      config: the fleet file; its `tensor_parallel` keys must not be set, as the plan says that.
      plan: made for a cluster that the devices can stand for: node `n`'s device `d` becomes the
        next device in order, so the plan needs as many as the nodes up to its last one have.
      devices: all that there are.

    Raises:
      PlanError: the plan is for other models or for more devices than there are.
      FleetConfigError: the fleet file says something else than the plan.
    """
    check_plan(config, plan)
    return [
        unit_part(config, plan, unit, _devices(plan, unit, devices))
        for unit in plan.units
        if unit.models
    ]


def check_plan(config: FleetConfig, plan: PlacementPlan) -> None:
    """Whether a plan is for a fleet.

    Raises:
      PlanError: the plan is for other models.
      FleetConfigError: the fleet file says something else than the plan.
    """
    if config.tensor_parallel > 1 or any(entry.tensor_parallel for entry in config.models):
        raise FleetConfigError(
            "tensor_parallel: with a plan, the plan says on how many devices each model runs; "
            "remove the key, or serve without the plan"
        )
    names = {entry.name for entry in config.models}
    planned = {model.name for unit in plan.units for model in unit.models}
    if missing := [entry.name for entry in config.models if entry.name not in planned]:
        raise PlanError(
            f"the plan has no place for {', '.join(missing)}: make it again with `muxjax plan`"
        )
    if unknown := sorted(planned - names):
        raise PlanError(
            f"the plan places {', '.join(unknown)}, which the fleet file has not: make it again "
            "with `muxjax plan`"
        )


def unit_part(
    config: FleetConfig, plan: PlacementPlan, unit: PlannedUnit, devices: tuple[jax.Device, ...]
) -> UnitPart:
    """One unit of a plan that `check_plan` lets pass, on as many devices as it has."""
    return UnitPart(
        name=unit.name,
        config=_config(config, unit, sum(each.size for each in plan.units)),
        devices=devices,
        demand=_demand(unit),
        seconds=unit.token_seconds,
    )


def _devices(
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


def _config(config: FleetConfig, unit: PlannedUnit, wanted: int) -> FleetConfig:
    """The unit's own fleet file. `pool.memory`, where given, is shared out by devices."""
    entries = {entry.name: entry for entry in config.models}
    memory = int(unit.kv_bytes * unit.size)
    if config.pool.memory is not None:
        memory = config.pool.memory * unit.size // wanted
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


def _demand(unit: PlannedUnit) -> Callable[[ModelSpec, StepEstimates], Demand]:
    """Quotas as planned; what a plan does not say is worked out from the load."""
    models = {model.name: model for model in unit.models}
    with_kv = any(model.kv_quota for model in unit.models)
    with_time = any(model.prefill_time or model.decode_time for model in unit.models)

    def demand(spec: ModelSpec, estimates: StepEstimates) -> Demand:
        expected, planned = expected_demand(spec, estimates), models[spec.name]
        return Demand(
            kv=planned.kv_quota if with_kv else expected.kv,
            prefill_seconds=planned.prefill_time if with_time else expected.prefill_seconds,
            decode_seconds=planned.decode_time if with_time else expected.decode_seconds,
        )

    return demand
