"""Plans and profiles for the planner's tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxjax.placement.costs.cluster import parse_cluster
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.plan import PlacementPlan
from muxjax.placement.planner.planner import PlannerOptions, plan_placement
from tests.placement.fleets import SHAPES

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def plan_of(loads: Sequence[ModelLoad], cluster: str, **options: object) -> PlacementPlan:
    parsed = parse_cluster(cluster)
    costs = [Roofline(SHAPES, group.device) for group in parsed.groups]
    return plan_placement(loads, parsed, costs, PlannerOptions(**options))  # type: ignore[arg-type]


def flat_profile(prefill: float = 10.0, decoding: float = 20.0) -> dict[str, Any]:
    """A profile with equal times for all batches and lengths."""
    cell = {"prefill": prefill, "decoding": decoding}
    cells = {str(b): {str(n): dict(cell) for n in (128, 256, 512)} for b in BATCHES}
    shares = {"30": cells, "100": cells}
    return {"llama-7b": {"1": shares, "2": shares}, "llama-13b": {"1": shares}}
