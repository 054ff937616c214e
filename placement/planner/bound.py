"""A score that no placement can exceed, from what each request takes at least.

The load itself is one bound. Others are fractional knapsacks, one for each resource of the whole
cluster: every model is given at its best, alone, with all the memory of its devices, and requests
are taken in order of what they are worth for what they take.

- Time sliced: device seconds. A request on `tp` devices takes at least `tp min_b h(b)`.
- Concurrent: device seconds of prefill, as prefills of a unit run in turn; and KV bytes times
  seconds, as each request holds its own for its output's decode steps at least.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxjax.placement.planner.estimator import POOL_SHARE, BatchCurve
from muxjax.placement.planner.scorer import SLACK_WORTH, Scorer


def upper_bound(scorer: Scorer) -> float:
    """A bound of `Placement.value`."""
    loads, groups = scorer.loads, scorer.cluster.groups
    devices = float(scorer.cluster.num_devices)
    ceiling = sum([w * load.rate for w, load in zip(scorer.weights, loads, strict=True)])
    curves = [_alone(scorer, model) for model in range(len(loads))]
    bounds = [ceiling]
    if scorer.execution == "time_sliced":
        takes = [
            min([curve.tp * _least_busy(curve, memory) for curve, memory in found])
            for found in curves
        ]
        bounds.append(_knapsack(scorer, takes, devices))
    else:
        takes = [
            min([c.tp * min([s / 2**k for k, s in enumerate(c.prefill)]) for c, _ in found])
            for found in curves
        ]
        bounds.append(_knapsack(scorer, takes, devices))
        memory = sum([group.nodes * group.devices * group.device.memory for group in groups])
        weights = sum([min([c.tp * c.weight_bytes for c, _ in found]) for found in curves])
        takes = [
            min([c.tp * c.sequence_bytes * min(c.decode) for c, _ in found]) for found in curves
        ]
        bounds.append(_knapsack(scorer, takes, POOL_SHARE * (memory - weights)))
    return min(bounds) + SLACK_WORTH * ceiling


def _alone(scorer: Scorer, model: int) -> list[tuple[BatchCurve, float]]:
    """One copy on a mesh of its own, for each kind of node and degree that it fits; and the memory
    of a device there.
    """
    found = []
    for group, nodes in enumerate(scorer.cluster.groups):
        load = scorer.loads[model]
        for size in nodes.mesh_sizes():
            if scorer.unit(group, size, ((model, 1.0),)) is None:
                continue
            for tp in scorer.degrees(group, size, model):
                share = scorer.costs[group].shares(load.kind, tp)[-1]
                share = 1.0 if scorer.execution == "time_sliced" else share
                curve = scorer.curve(group, size, tp, share, (model, 1.0))
                found.append((curve, nodes.device.memory))
    return found


def _least_busy(curve: BatchCurve, memory: float) -> float:
    """The least mesh seconds of a request, over the batches that fit."""
    most = POOL_SHARE * (memory - curve.weight_bytes) / curve.sequence_bytes
    return min([busy / 2**k for k, busy in enumerate(curve.busy) if 2**k < 2 * most or k == 0])


def _knapsack(scorer: Scorer, takes: Sequence[float], room: float) -> float:
    """The value of the requests that fit, those first that are worth most for what they take."""
    value = 0.0
    order = sorted(
        zip(scorer.weights, scorer.loads, takes, strict=True),
        key=lambda x: -x[0] / max(x[2], 1e-30),
    )
    for weight, load, take in order:
        served = min(load.rate, room / take) if take > 0 else load.rate
        value += weight * served
        room -= served * take
        if room <= 0:
            break
    return value
