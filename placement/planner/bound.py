"""Upper bound of the objective over all placements, from the minimum resources of each request.

The offered load is one bound. The others are fractional knapsacks, one for each resource of the
cluster. They assume that every model runs isolated in its best configuration with all the memory of
its devices. Requests are served in descending order of value per resource.

- Time-sliced: device seconds. A request on `tp` devices takes at least `tp min_b h(b)`.
- Concurrent: device seconds of prefill, because prefills of a unit run one after the other; and KV
  bytes times seconds, because a request occupies its KV at least during its decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxjax.placement.planner.batch_curve import POOL_SHARE, BatchCurve
from muxjax.placement.planner.scorer import SLACK_VALUE, Scorer


def upper_bound(scorer: Scorer) -> float:
    """A value that `Placement.value` cannot exceed."""
    loads, groups = scorer.loads, scorer.cluster.groups
    devices = float(scorer.cluster.num_devices)
    offered = sum([w * load.expected.rate for w, load in zip(scorer.weights, loads, strict=True)])
    curves = [_isolated_curves(scorer, model) for model in range(len(loads))]
    bounds = [offered]
    if scorer.execution == "time_sliced":
        costs = [
            min([curve.tp * _min_mesh_seconds(curve, memory) for curve, memory in options])
            for options in curves
        ]
        bounds.append(_knapsack(scorer, costs, devices))
    else:
        costs = [
            min([c.tp * min([s / 2**k for k, s in enumerate(c.prefill)]) for c, _ in options])
            for options in curves
        ]
        bounds.append(_knapsack(scorer, costs, devices))
        memory = sum([group.nodes * group.devices * group.device.memory for group in groups])
        weights = sum([min([c.tp * c.weight_bytes for c, _ in options]) for options in curves])
        costs = [
            min([c.tp * c.sequence_bytes * min(c.decode) for c, _ in options]) for options in curves
        ]
        bounds.append(_knapsack(scorer, costs, POOL_SHARE * (memory - weights)))
    return min(bounds) + SLACK_VALUE * offered


def _isolated_curves(scorer: Scorer, model: int) -> list[tuple[BatchCurve, float]]:
    """Batch curves of an isolated model, and bytes of device memory, for each feasible mesh."""
    options = []
    for group, nodes in enumerate(scorer.cluster.groups):
        load = scorer.loads[model]
        for size in nodes.mesh_sizes():
            if scorer.score(group, size, ((model, 1.0),)) is None:
                continue
            for tp in scorer.tp_sizes(group, size, model):
                share = scorer.costs[group].shares(load.kind, tp)[-1]
                share = 1.0 if scorer.execution == "time_sliced" else share
                curve = scorer.curve(group, size, tp, share, (model, 1.0))
                options.append((curve, nodes.device.memory))
    return options


def _min_mesh_seconds(curve: BatchCurve, memory: float) -> float:
    """The minimum mesh seconds per request over the batches that fit."""
    largest = POOL_SHARE * (memory - curve.weight_bytes) / curve.sequence_bytes
    return min(
        [
            seconds / 2**k
            for k, seconds in enumerate(curve.mesh_time)
            if 2**k < 2 * largest or k == 0
        ]
    )


def _knapsack(scorer: Scorer, costs: Sequence[float], capacity: float) -> float:
    """The maximum value of requests with these costs within a capacity (fractional knapsack)."""
    value = 0.0
    order = sorted(
        zip(scorer.weights, scorer.loads, costs, strict=True),
        key=lambda x: -x[0] / max(x[2], 1e-30),
    )
    for weight, load, cost in order:
        rate = load.expected.rate
        served = min(rate, capacity / cost) if cost > 0 else rate
        value += weight * served
        capacity -= served * cost
        if capacity <= 0:
            break
    return value
