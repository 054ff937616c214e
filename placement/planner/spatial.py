"""Spatial partitioning: each model on devices of its own, the baseline without sharing.

A model gets the fewest devices that hold its weights and a request of full length; devices that are
left over double, one model at a time, the mesh of whoever needs most device time for each device it
has. Meshes are powers of two inside one node.
"""

from __future__ import annotations

from collections.abc import Mapping

from muxjax.errors import PlanError
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.plan import PlacementPlan, PlannedModel, PlannedUnit

POOL_SHARE = 0.9
"""Part of the memory beside the weights that the pool takes, as in the estimator."""
_BATCH = 32
"""The batch at which models' needs of device time are compared."""


def spatial_units(
    plan: PlacementPlan, costs: PlanningCosts, shapes: Mapping[str, ModelShape]
) -> tuple[PlannedUnit, ...]:
    """The models of a plan, each on devices of its own in the plan's cluster.

    Raises:
      PlanError: a model fits no mesh, or there are fewer devices than the models need; says how
        many more it takes.
    """
    nodes = [group for group in plan.cluster for _ in range(group.nodes)]
    memory = {device.name: device.memory for device in plan.devices}
    models = _whole_models(plan)
    if not nodes or not models:
        raise PlanError("spatial partitioning needs a cluster and a model at least")
    least = min(memory[node.device] for node in nodes)
    widest = max(node.devices for node in nodes)
    fitting = {model.name: _fitting(model, costs, shapes, least, widest) for model in models}
    for model in models:
        if not fitting[model.name]:
            weights = costs.weight_bytes(model.kind, tp=1) / 1e9
            raise PlanError(
                f"{model.name} ({weights:.3g} GB of weights) fits no mesh of up to {widest} "
                f"devices of {least / 1e9:.3g} GB; quantise it, or use larger devices"
            )
    sizes = {name: degrees[0] for name, degrees in fitting.items()}
    there = sum(node.devices for node in nodes)
    if sum(sizes.values()) > there:
        raise PlanError(
            f"spatial partitioning needs {sum(sizes.values())} devices for {len(models)} models, "
            f"and there are {there}: {_shown(sizes)}"
        )
    room = [node.devices for node in nodes]
    if _packed(sizes, room) is None:
        raise PlanError(f"the meshes do not fit the nodes ({room} devices): {_shown(sizes)}")
    growing = {model.name: model for model in models}
    while growing:
        neediest = max(growing.values(), key=lambda m: _need(m, costs, sizes[m.name]))
        larger = [size for size in fitting[neediest.name] if size > sizes[neediest.name]]
        trial = {**sizes, neediest.name: larger[0]} if larger else None
        if trial is not None and _packed(trial, room) is not None:
            sizes = trial
        else:
            del growing[neediest.name]
    places = _packed(sizes, room)
    assert places is not None
    units = []
    for model in models:
        node, first = places[model.name]
        units.append(
            _unit(model, sizes[model.name], node, first, nodes[node].device, memory, costs)
        )
    return tuple(units)


def _whole_models(plan: PlacementPlan) -> list[PlannedModel]:
    """Each model once, with the rates of its replicas added up."""
    models: dict[str, PlannedModel] = {}
    for unit in plan.units:
        for model in unit.models:
            rate = model.rate + (models[model.name].rate if model.name in models else 0.0)
            models[model.name] = model.model_copy(update={"rate": rate})
    return list(models.values())


def _fitting(
    model: PlannedModel,
    costs: PlanningCosts,
    shapes: Mapping[str, ModelShape],
    memory: float,
    widest: int,
) -> list[int]:
    """Mesh sizes that hold the weights, one request of full length and the dummy block."""
    tokens = 2 * shapes[model.kind].max_position
    return [
        tp
        for tp in costs.tp_degrees(model.kind)
        if tp <= widest
        and POOL_SHARE * (memory - costs.weight_bytes(model.kind, tp=tp))
        > tokens * costs.kv_bytes_per_token(model.kind, tp=tp)
    ]


def _need(model: PlannedModel, costs: PlanningCosts, size: int) -> float:
    """Device seconds per second and mesh."""
    prompt, output = max(1.0, model.prompt_tokens), model.output_tokens
    prefill = costs.prefill_seconds(model.kind, prompt, prompt, tp=size)
    decode = costs.decode_seconds(model.kind, _BATCH, prompt + output / 2, tp=size)
    return model.rate * (prefill + output * decode / _BATCH)


def _packed(sizes: Mapping[str, int], room: list[int]) -> dict[str, tuple[int, int]] | None:
    """Node and first device of each mesh, largest first into the first node with room."""
    free = list(room)
    places: dict[str, tuple[int, int]] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        for node, left in enumerate(free):
            if left >= sizes[name]:
                places[name] = (node, room[node] - left)
                free[node] -= sizes[name]
                break
        else:
            return None
    return places


def _unit(
    model: PlannedModel,
    size: int,
    node: int,
    first: int,
    device: str,
    memory: Mapping[str, float],
    costs: PlanningCosts,
) -> PlannedUnit:
    weights = costs.weight_bytes(model.kind, tp=size)
    pool = POOL_SHARE * (memory[device] - weights)
    tokens = max(1.0, model.prompt_tokens + model.output_tokens)
    alone = model.model_copy(
        update={
            "tp": size,
            "replicas": 1,
            "prefill_share": 1.0,
            "decode_share": 1.0,
            "kv_floor": 0.0,
            "kv_quota": 0.0,
            "max_batch": max(
                1, int(pool / (tokens * costs.kv_bytes_per_token(model.kind, tp=size)))
            ),
        }
    )
    return PlannedUnit(
        name=model.name,
        node=node,
        device=device,
        devices=tuple(range(first, first + size)),
        weight_bytes=weights,
        reserved_bytes=memory[device] - weights - pool,
        kv_bytes=pool,
        throughput=0.0,
        models=(alone,),
    )


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
