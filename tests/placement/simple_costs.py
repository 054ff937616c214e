"""A linear cost model, for expected values computed by hand, and plans for it."""

from __future__ import annotations

from muxjax.placement.costs.model_shape import ModelShape
from muxjax.placement.planner.plan import (
    Execution,
    PlacementPlan,
    PlannedDevice,
    PlannedModel,
    PlannedNodes,
    PlannedUnit,
)

SHAPE = ModelShape(2, 64, 128, 4, 4, 16, 1000, max_position=512)
"""KV of a token: 2 x 2 layers x 4 heads x 16 x 2 bytes = 512 bytes."""


class SimpleCosts:
    """1 ms per prompt token and 10 ms per decode step, on one device with all of its compute."""

    @property
    def models(self) -> tuple[str, ...]:
        return ("small", "large")

    def shape(self, model: str) -> ModelShape:
        return SHAPE

    def tp_sizes(self, model: str) -> tuple[int, ...]:
        return (1, 2, 4) if model == "small" else (2, 4)

    def shares(self, model: str, tp: int) -> tuple[float, ...]:
        return (0.5, 1.0)

    def prefill_seconds(
        self, model: str, num_tokens: float, length: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        return 1e-3 * num_tokens / tp / share

    def decode_seconds(
        self, model: str, batch: float, context: float, *, tp: int = 1, share: float = 1.0
    ) -> float:
        return 1e-2 / tp / share

    def weight_bytes(self, model: str, *, tp: int = 1) -> float:
        return 1e6 / tp

    def kv_bytes_per_token(self, model: str, *, tp: int = 1) -> float:
        return SHAPE.kv_bytes_per_token(tp)


def planned(name: str, kind: str = "small", rate: float = 1.0, **fields: float) -> PlannedModel:
    settings = {"prompt_tokens": 20.0, "output_tokens": 10.0, "max_batch": 16, **fields}
    return PlannedModel(name=name, kind=kind, rate=rate, **settings)


def unit(*models: PlannedModel, name: str = "unit-0", kv_bytes: float = 2e6) -> PlannedUnit:
    size = models[0].tp * models[0].replicas
    return PlannedUnit(
        name=name,
        node=0,
        device="toy",
        devices=tuple(range(size)),
        weight_bytes=1e6,
        reserved_bytes=0.0,
        kv_bytes=kv_bytes,
        throughput=1.0,
        models=models,
    )


def plan(
    *units: PlannedUnit, execution: Execution = "time_sliced", devices: int = 4, memory: float = 8e6
) -> PlacementPlan:
    placed = []
    first = 0
    for planned_unit in units:
        indices = tuple(range(first, first + planned_unit.size))
        placed.append(planned_unit.model_copy(update={"devices": indices}))
        first += planned_unit.size
    device = PlannedDevice(
        name="toy",
        flops=1e12,
        bandwidth=1e9,
        memory=memory,
        link_bandwidth=1e9,
        launch_seconds=0.0,
    )
    return PlacementPlan(
        muxjax="0",
        config_hash="0",
        execution=execution,
        objective="throughput",
        cluster=(PlannedNodes(nodes=1, devices=devices, device="toy"),),
        devices=(device,),
        shapes={"small": SHAPE, "large": SHAPE},
        units=tuple(placed),
        throughput=1.0,
        weighted_throughput=1.0,
        rate=1.0,
        slo_attainment=1.0,
        score=1.0,
        bound=1.0,
        gap=0.0,
        seconds=0.0,
    )
