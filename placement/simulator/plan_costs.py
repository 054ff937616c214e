"""Builds cost models and attainment criteria from a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.devices import Device
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.simulator.metrics import AttainmentCriterion
from muxjax.scheduling.specs import LatencySlo

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
    default: AttainmentCriterion,
    slos: Mapping[str, LatencySlo] | None = None,
) -> dict[str, AttainmentCriterion]:
    """Builds the attainment criterion of each model of a plan.

    Args:
      plan: the plan.
      costs: cost model for each kind of device.
      default: the criterion of models without an SLO in `slos`. The isolated latency assumes the
        fewest devices that fit the model.
      slos: SLOs of individual models; only explicit targets are checked.
    """
    memory = min(device.memory for device in plan.devices)
    first = next(iter(costs.values()))
    criteria = {}
    for unit in plan.units:
        for model in unit.models:
            sizes = first.tp_sizes(model.kind)
            fitting = [
                tp
                for tp in sizes
                if first.weight_bytes(model.kind, tp=tp) < _MAX_WEIGHT_FRACTION * memory
            ]
            tp = fitting[0] if fitting else sizes[-1]
            slo = (slos or {}).get(model.name)
            criterion = default if slo is None else AttainmentCriterion(slo)
            criteria[model.name] = replace(criterion, kind=model.kind, tp=tp)
    return criteria
