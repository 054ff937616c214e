"""Error messages for fleets that do not fit, with possible remedies."""

from __future__ import annotations

from muxjax.errors import PlanError
from muxjax.placement.planner.batch_curve import POOL_SHARE
from muxjax.placement.planner.scorer import Scorer


def check_each_model_fits(scorer: Scorer) -> None:
    """Raises PlanError for a model that fits on no mesh, even without other models."""
    for model in range(len(scorer.loads)):
        fits = any(
            scorer.score(group, size, ((model, 1.0),)) is not None
            for group, nodes in enumerate(scorer.cluster.groups)
            for size in nodes.mesh_sizes()
        )
        if not fits:
            raise PlanError(_does_not_fit(scorer, model))


def _does_not_fit(scorer: Scorer, model: int) -> str:
    load, best, highest = scorer.loads[model], "", 0.0
    tokens = load.expected.request_tokens
    for group, nodes in enumerate(scorer.cluster.groups):
        for size in nodes.mesh_sizes():
            for tp in scorer.tp_sizes(group, size, model):
                costs = scorer.costs[group]
                weights = costs.weight_bytes(load.kind, tp=tp)
                pool = tokens * costs.kv_bytes_per_token(load.kind, tp=tp) / POOL_SHARE
                fraction = nodes.device.memory / (weights + pool)
                if fraction > highest:
                    highest = fraction
                    best = (
                        f"on {tp} x {nodes.device.name} it needs {weights / 1e9:.1f} GB of weights "
                        f"and {pool / 1e9:.1f} GB for one request of {tokens:.0f} tokens on each "
                        f"device, which has {nodes.device.memory / 1e9:.1f} GB"
                    )
    name = load.name if load.kind == load.name else f"{load.name} ({load.kind})"
    if not best:
        known = ", ".join(map(str, scorer.costs[0].tp_sizes(load.kind)))
        return (
            f"{name} fits nowhere on {scorer.cluster}: it can be sharded over {known} devices, and "
            "no node has that many; use nodes with more devices"
        )
    return (
        f"{name} fits nowhere on {scorer.cluster}: {best}; {1 / highest:.1f} times the memory "
        "would be enough: use larger devices, nodes with more devices to shard it over, fewer "
        "bits per weight, or shorter requests"
    )


def fleet_does_not_fit(scorer: Scorer) -> str:
    """The message for models that fit individually but not together."""
    needed = 0.0
    for load in scorer.loads:
        costs, tokens = scorer.costs[0], load.expected.request_tokens
        needed += min(
            tp
            * (
                costs.weight_bytes(load.kind, tp=tp)
                + tokens * costs.kv_bytes_per_token(load.kind, tp=tp) / POOL_SHARE
            )
            for tp in costs.tp_sizes(load.kind)
        )
    available = sum(g.nodes * g.devices * g.device.memory for g in scorer.cluster.groups)
    largest = max(scorer.loads, key=lambda load: scorer.costs[0].weight_bytes(load.kind))
    return (
        f"the fleet does not fit on {scorer.cluster}: its {len(scorer.loads)} models need at least "
        f"{needed / 1e9:.0f} GB for weights and one request each, and the devices have "
        f"{available / 1e9:.0f} GB; add devices, or remove models ({largest.name} is the largest)"
    )
