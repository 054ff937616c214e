"""Spatial partitioning: each model on separate devices, the baseline without multiplexing.

A model gets the fewest devices that fit its weights and a request of full length. Then the mesh of
the model with the highest demand is doubled repeatedly, until no more devices can be used. Meshes
are powers of two within one node.
"""

from __future__ import annotations

from collections.abc import Mapping

from muxjax.errors import PlanError
from muxjax.placement.costs.cost_model import PlanningCosts
from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.batch_curve import POOL_SHARE
from muxjax.placement.planner.plan import PlacementPlan, PlannedModel, PlannedUnit

_BATCH = 32
"""Batch, in sequences, at which the models' demands of device time are compared."""


def spatial_units(
    plan: PlacementPlan, costs: PlanningCosts, shapes: Mapping[str, ModelShape]
) -> tuple[PlannedUnit, ...]:
    """Places each model of a plan on separate devices of the plan's cluster.

    Raises:
      PlanError: a model fits on no mesh, or the cluster has too few devices.
    """
    nodes = [group for group in plan.cluster for _ in range(group.nodes)]
    memory = {device.name: device.memory for device in plan.devices}
    models = _merge_replicas(plan)
    if not nodes or not models:
        raise PlanError("spatial partitioning needs at least one node and one model")
    min_memory = min(memory[node.device] for node in nodes)
    max_devices = max(node.devices for node in nodes)
    fitting = {
        model.name: _mesh_sizes(model, costs, shapes, min_memory, max_devices) for model in models
    }
    for model in models:
        if not fitting[model.name]:
            weights = costs.weight_bytes(model.kind, tp=1) / 1e9
            raise PlanError(
                f"{model.name} ({weights:.3g} GB of weights) fits no mesh of up to {max_devices} "
                f"devices of {min_memory / 1e9:.3g} GB; quantize it, or use larger devices"
            )
    sizes = {name: options[0] for name, options in fitting.items()}
    available = sum(node.devices for node in nodes)
    if sum(sizes.values()) > available:
        raise PlanError(
            f"spatial partitioning needs {sum(sizes.values())} devices for {len(models)} models, "
            f"but the cluster has {available}: {_describe(sizes)}"
        )
    capacities = [node.devices for node in nodes]
    if _pack(sizes, capacities) is None:
        raise PlanError(
            f"the meshes do not fit the nodes ({capacities} devices): {_describe(sizes)}"
        )
    growing = {model.name: model for model in models}
    while growing:
        busiest = max(growing.values(), key=lambda m: _demand(m, costs, sizes[m.name]))
        larger = [size for size in fitting[busiest.name] if size > sizes[busiest.name]]
        trial = {**sizes, busiest.name: larger[0]} if larger else None
        if trial is not None and _pack(trial, capacities) is not None:
            sizes = trial
        else:
            del growing[busiest.name]
    places = _pack(sizes, capacities)
    assert places is not None
    units = []
    for model in models:
        node, first = places[model.name]
        units.append(
            _planned_unit(model, sizes[model.name], node, first, nodes[node].device, memory, costs)
        )
    return tuple(units)


def _merge_replicas(plan: PlacementPlan) -> list[PlannedModel]:
    """The models of a plan without duplicates, each with the sum of its rates over all units."""
    models: dict[str, PlannedModel] = {}
    for unit in plan.units:
        for model in unit.models:
            rate = model.rate + (models[model.name].rate if model.name in models else 0.0)
            models[model.name] = model.model_copy(update={"rate": rate})
    return list(models.values())


def _mesh_sizes(
    model: PlannedModel,
    costs: PlanningCosts,
    shapes: Mapping[str, ModelShape],
    memory: float,
    max_devices: int,
) -> list[int]:
    """Mesh sizes that fit weights, one request of full length and the dummy block, ascending."""
    tokens = 2 * shapes[model.kind].max_position
    return [
        tp
        for tp in costs.tp_sizes(model.kind)
        if tp <= max_devices
        and POOL_SHARE * (memory - costs.weight_bytes(model.kind, tp=tp))
        > tokens * costs.kv_bytes_per_token(model.kind, tp=tp)
    ]


def _demand(model: PlannedModel, costs: PlanningCosts, size: int) -> float:
    """Mesh seconds per second of the model's load on `size` devices."""
    prompt, output = max(1.0, model.prompt_tokens), model.output_tokens
    prefill = costs.prefill_seconds(model.kind, prompt, prompt, tp=size)
    decode = costs.decode_seconds(model.kind, _BATCH, prompt + output / 2, tp=size)
    return model.rate * (prefill + output * decode / _BATCH)


def _pack(sizes: Mapping[str, int], capacities: list[int]) -> dict[str, tuple[int, int]] | None:
    """Node and first device of each mesh (first fit, largest first); None if they do not fit."""
    free = list(capacities)
    places: dict[str, tuple[int, int]] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        for node, left in enumerate(free):
            if left >= sizes[name]:
                places[name] = (node, capacities[node] - left)
                free[node] -= sizes[name]
                break
        else:
            return None
    return places


def _planned_unit(
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
    tokens = max(1.0, model.expected_load.request_tokens)
    isolated = model.model_copy(
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
        models=(isolated,),
    )


def _describe(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
