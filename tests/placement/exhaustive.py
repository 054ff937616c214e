"""The best placement of a tiny fleet by exhaustive search, as a reference for the planner.

Tries all partitions of the models, all mesh sizes, all ways to pack the meshes on the nodes, and
all `tp` sizes. Only the estimator is shared with the planner.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence

from muxjax.errors import PlanError
from muxjax.placement.costs.cluster import Cluster
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.roofline import Roofline
from muxjax.placement.planner.batch_curve import build_batch_curve
from muxjax.placement.planner.estimator import find_operating_point
from muxjax.placement.planner.exact import solve
from muxjax.placement.planner.load import ModelLoad
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.planner import plan_placement
from muxjax.placement.planner.scorer import Scorer
from muxjax.placement.planner.search import Search
from tests.placement.fleets import SHAPES, tiny_fleet


def best_throughput(
    loads: Sequence[ModelLoad], cluster: Cluster, costs: PlanningCosts
) -> float | None:
    """Requests per second of the best time-sliced placement; None if nothing fits."""
    (group,) = cluster.groups
    sizes = [size for size in (1, 2, 4, 8) if size <= group.devices]
    unit_values: dict[tuple[tuple[int, ...], int], float | None] = {}

    def unit_value(part: tuple[int, ...], size: int) -> float | None:
        if (part, size) not in unit_values:
            unit_values[part, size] = _best_unit_throughput(
                [loads[model] for model in part], size, group.device.memory, costs
            )
        return unit_values[part, size]

    best: float | None = None
    for parts in partitions(list(range(len(loads)))):
        for chosen in itertools.product(sizes, repeat=len(parts)):
            values = [
                unit_value(tuple(part), size) for part, size in zip(parts, chosen, strict=True)
            ]
            if any(value is None for value in values):
                continue
            total = sum(value for value in values if value is not None)
            if (best is None or total > best) and packs(chosen, [group.devices] * group.nodes):
                best = total
    return best


def _best_unit_throughput(
    loads: Sequence[ModelLoad], size: int, memory: float, costs: PlanningCosts
) -> float | None:
    options = [
        [tp for tp in costs.tp_sizes(load.kind) if tp <= size and size % tp == 0] for load in loads
    ]
    best: float | None = None
    for tp_sizes in itertools.product(*options):
        curves = [
            build_batch_curve(load, costs, size=size, tp=tp)
            for load, tp in zip(loads, tp_sizes, strict=True)
        ]
        point = find_operating_point(curves, memory, "time_sliced")
        if point is not None:
            served = sum(
                load.expected.rate * fraction
                for load, fraction in zip(loads, point.served, strict=True)
            )
            best = served if best is None else max(best, served)
    return best


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Generates all partitions of a list into unordered parts."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for parts in partitions(rest):
        yield [[first], *parts]
        for index in range(len(parts)):
            yield [*parts[:index], [first, *parts[index]], *parts[index + 1 :]]


def packs(sizes: Sequence[int], nodes: list[int]) -> bool:
    """Whether meshes of these sizes fit on nodes with these numbers of free devices."""
    if not sizes:
        return True
    return any(
        left >= sizes[0]
        and packs(sizes[1:], [*nodes[:index], left - sizes[0], *nodes[index + 1 :]])
        for index, left in enumerate(nodes)
    )


def compare(cases: int) -> dict[str, float]:
    """Measures the gaps of the planner, and of its search, to the optimum of random tiny fleets."""
    gaps: list[float] = []
    search_gaps: list[float] = []
    seed = 0
    while len(gaps) < cases:
        loads, cluster = tiny_fleet(seed)
        seed += 1
        costs = Roofline(SHAPES, cluster.groups[0].device)
        best = best_throughput(loads, cluster, costs)
        if best is None:
            try:
                plan_placement(loads, cluster, [costs])
            except PlanError:
                continue
            raise AssertionError(f"seed {seed}: a plan for a fleet that does not fit")
        gaps.append(max(0.0, 1 - plan_placement(loads, cluster, [costs]).throughput / best))
        if len(gaps) % 5 == 0:
            scorer = Scorer(loads, cluster, [costs], "time_sliced")
            exact = solve(scorer)
            placement = Search(scorer).run([], 400)
            assert placement is not None
            if exact is not None:
                search_gaps.append(max(0.0, 1 - placement.value / Placement(scorer, exact).value))
    return {
        "cases": len(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "worst_gap": max(gaps),
        "mean_gap_of_search": sum(search_gaps) / len(search_gaps),
    }


if __name__ == "__main__":
    print(json.dumps(compare(int(sys.argv[1]))))
