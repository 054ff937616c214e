"""What a plan's file says of costs, made into cost models and latency targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from muxjax.errors import PlanError
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.devices import Device
from muxjax.placement.costs.profile_table import ProfileTable
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import Slo
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.simulator.metrics import AttainmentTarget

_USABLE = 0.9
"""Part of the memory that the weights of a model alone may fill."""


def plan_costs(plan: PlacementPlan) -> dict[str, PlanningCosts]:
    """A cost model for each kind of device: the profile the plan was made from, or the roofline.

    Raises:
      ProfileError: the profile is not there any more, or not valid.
    """
    if plan.profile is not None:
        table = ProfileTable(plan.profile, plan.shapes)
        return {device.name: table for device in plan.devices}
    return {
        device.name: Roofline(plan.shapes, Device(**device.model_dump())) for device in plan.devices
    }


def plan_targets(
    plan: PlacementPlan,
    costs: Mapping[str, PlanningCosts],
    asked: AttainmentTarget,
    slos: Mapping[str, Slo] | None = None,
) -> dict[str, AttainmentTarget]:
    """The latency target of each model.

    Args:
      plan: whose models.
      costs: for each kind of device.
      asked: the target of models without one of their own. A `scale` is of the time alone on the
        fewest devices that hold the model.
      slos: the targets that some models have of their own.

    Raises:
      PlanError: a target that is not above 0.
    """
    for name in ("ttft", "tpot", "scale"):
        value = getattr(asked, name)
        if value is not None and not value > 0:
            raise PlanError(f"the target for {name} must be above 0, not {value}")
    memory = min(device.memory for device in plan.devices)
    first = next(iter(costs.values()))
    targets = {}
    for unit in plan.units:
        for model in unit.models:
            degrees = first.tp_degrees(model.kind)
            holding = [
                tp for tp in degrees if first.weight_bytes(model.kind, tp=tp) < _USABLE * memory
            ]
            tp = holding[0] if holding else degrees[-1]
            target = replace(asked, kind=model.kind, tp=tp)
            slo = (slos or {}).get(model.name)
            if slo is not None:
                target = replace(target, ttft=slo.ttft, tpot=slo.tpot, scale=None)
            targets[model.name] = target
    return targets
