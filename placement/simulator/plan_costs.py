"""Builds cost models and attainment criteria from a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.devices import Device
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.plan import PlacementPlan, PlannedTarget
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.scheduling.specs import DEFAULT_SCALE

_MAX_WEIGHT_FRACTION = 0.9
"""Maximum fraction of device memory for the weights of an isolated model."""


def plan_costs(plan: PlacementPlan) -> dict[str, PlanningCosts]:
    """Builds a cost model for each kind of device: the plan's profile, else a roofline.

    Raises:
      ProfileError: the profile does not exist or is invalid.
    """
    if plan.profile is not None:
        table = ProfileTable(plan.profile, plan.shapes)
        return {device.name: table for device in plan.devices}
    return {
        device.name: Roofline(plan.shapes, Device(**device.model_dump())) for device in plan.devices
    }


def plan_criteria(
    plan: PlacementPlan,
    costs: Mapping[str, PlanningCosts],
    default: AttainmentCriterion | None = None,
) -> dict[str, AttainmentCriterion]:
    """Builds the attainment criterion of each model of a plan.

    Args:
      plan: the plan.
      costs: cost model per kind of device.
      default: the criterion of every model; None: the plan's targets. A model without a target may
        take `DEFAULT_SCALE` times its isolated latency.
    """
    memory = min(device.memory for device in plan.devices)
    first = next(iter(costs.values()))
    kinds = {model.name: model.kind for unit in plan.units for model in unit.models}
    return {
        name: model_criterion(default, plan.targets.get(name), kind, first, memory)
        for name, kind in kinds.items()
    }


def model_criterion(
    default: AttainmentCriterion | None,
    target: PlannedTarget | None,
    kind: str,
    costs: PlanningCosts,
    memory: float,
) -> AttainmentCriterion:
    """The criterion of one model; its isolated latency is on the fewest devices that hold it.

    Args:
      default: the criterion, without the model; None: `target`.
      target: the model's target; None: `DEFAULT_SCALE` times the isolated latency.
      kind: the model's name in the cost model.
      costs: the cost model.
      memory: bytes of a device.
    """
    sizes = costs.tp_sizes(kind)
    fitting = [
        tp for tp in sizes if costs.weight_bytes(kind, tp=tp) < _MAX_WEIGHT_FRACTION * memory
    ]
    tp = fitting[0] if fitting else sizes[-1]
    if default is None:
        target = target or PlannedTarget(scale=DEFAULT_SCALE)
        default = AttainmentCriterion.from_targets(target.ttft, target.tpot, target.scale)
    return replace(default, kind=kind, tp=tp)
