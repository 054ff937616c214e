"""MuxServe's own search as released ("upstream"): Algorithm 1 with its bugs, for comparisons.

A reimplementation of `PlacementOptimizer` of hao-ai-lab/MuxServe, `muxserve/muxsched/placement.py`
(2024); see `upstream_estimator.py`. It tries all combinations of node splits. Models are placed in
order of rate times a scale of their size, each on the mesh where the score grows most. The previous
score of a mesh is looked up by its position in a list that is sorted after every model; often it is
the score of another mesh. The number of combinations explodes with the number of nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from muxjax.errors import PlanError
from muxjax.placement.planner.upstream_estimator import (
    DEVICE_GB,
    MESH_SIZES,
    UpstreamEstimator,
    UpstreamModel,
)

NODE_SPLITS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: (
        (8,), (4, 4), (4, 2, 2), (4, 2, 1, 1), (4, 1, 1, 1, 1), (2, 2, 2, 2), (2, 2, 2, 1, 1),
        (2, 2, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1),
    ),
    6: ((4, 2), (4, 1, 1), (2, 2, 2), (2, 2, 1, 1), (2, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1)),
    4: ((4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)),
    2: ((2,), (1, 1)),
    1: ((1,),),
}  # fmt: skip
"""Upstream's splits of a node into meshes, by devices of the node, in upstream's order. The list is
not complete."""

MAX_COMBINATIONS = 200_000
_RESERVED = 0.4
_USABLE = 0.9
_PROCESS_GB = 1.6 + 6
_OVERLOAD_PERCENT = 20


@dataclass
class UpstreamMesh:
    """A mesh in upstream's search: free memory and compute, and the placed models.

    Attributes:
      size: devices.
      free_gb: GB of memory left for weights.
      free_percent: percent of the compute left for decoding.
      placed: name and percent of compute of each model.
    """

    size: int
    free_gb: float = 0.0
    free_percent: int = 100
    placed: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_gb = _USABLE * (1 - _RESERVED) * DEVICE_GB * self.size

    def fits(self, model: UpstreamModel, percent: int) -> bool:
        """Whether the weights fit, and the compute share with an overload of at most 20 %."""
        enough = self.free_percent + _OVERLOAD_PERCENT >= percent
        return self.free_gb >= model.weight_gb and enough

    def place(self, model: UpstreamModel, percent: int) -> None:
        """Places a model on the mesh."""
        self.placed.append((model.name, percent))
        self.free_gb -= model.weight_gb + _PROCESS_GB
        self.free_percent -= percent


@dataclass(frozen=True)
class UpstreamPlacement:
    """The result of upstream's search.

    Attributes:
      score: throughput weighted by rates.
      meshes: size, then name and percent of compute of each model; the largest mesh first.
    """

    score: float
    meshes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]


def count_combinations(nodes: int, devices: int) -> int:
    """The number of combinations of node splits that upstream tries."""
    return math.comb(len(NODE_SPLITS.get(devices, ())) + nodes - 1, nodes)


def search_as_upstream(
    estimator: UpstreamEstimator, nodes: int, devices: int
) -> UpstreamPlacement | None:
    """Finds the best placement over all combinations of node splits; None if nothing fits.

    Args:
      estimator: the fleet.
      nodes: number of nodes.
      devices: devices of each node.

    Raises:
      PlanError: a number of devices without splits, or too many combinations.
    """
    if devices not in NODE_SPLITS:
        raise PlanError(
            f"upstream's search does not support nodes of {devices} devices, only of "
            f"{', '.join(map(str, NODE_SPLITS))}; plan without --upstream-compatible"
        )
    count = count_combinations(nodes, devices)
    if count > MAX_COMBINATIONS:
        raise PlanError(
            f"upstream's search would try {count:.1e} combinations for {nodes} nodes of {devices} "
            "devices; plan without --upstream-compatible"
        )
    models = _placement_order(list(estimator.models.values()))
    required = max(
        min(
            (size for size in MESH_SIZES if estimator.candidate(m.name, size)),
            default=MESH_SIZES[-1],
        )
        for m in models
    )
    best: UpstreamPlacement | None = None
    for splits in itertools.combinations_with_replacement(NODE_SPLITS[devices], nodes):
        sizes = [size for split in splits for size in split]
        if max(sizes) < required or len(sizes) > len(models):
            continue
        placement = _place_all(estimator, models, sizes)
        if placement is not None and (best is None or placement.score > best.score):
            best = placement
    return best


def _placement_order(models: list[UpstreamModel]) -> list[UpstreamModel]:
    by_base = sorted(models, key=lambda m: (m.rate * m.base_devices, m.base_devices), reverse=True)
    return sorted(by_base, key=lambda m: (m.rate * m.rate_scale, m.rate_scale), reverse=True)


def _place_all(
    estimator: UpstreamEstimator, models: Sequence[UpstreamModel], sizes: Sequence[int]
) -> UpstreamPlacement | None:
    """Algorithm 1 on one group of meshes, with upstream's bookkeeping."""
    meshes = [UpstreamMesh(size) for size in sizes]
    order = [(mesh, 0.0) for mesh in meshes]
    order.sort(key=_mesh_priority, reverse=True)
    by_position = [0.0] * len(meshes)
    for m in models:
        best, highest, percent = -1, -100.0, 0
        for i, (mesh, _) in enumerate(order):
            candidate = estimator.candidate(m.name, mesh.size)
            if candidate is None or not mesh.fits(m, candidate.percent):
                continue
            placed = (*mesh.placed, (m.name, candidate.percent))
            increase = estimator.score_unit(mesh.size, placed)[0] - by_position[i]
            if increase > highest:
                best, highest, percent = i, increase, candidate.percent
            elif increase == highest and mesh.size < meshes[best].size:
                best, percent = i, candidate.percent
        if best < 0:
            return None
        mesh, priority = order[best]
        mesh.place(m, percent)
        order[best] = mesh, priority - m.rate * m.rate_scale / mesh.size
        by_position[best] += highest
        order.sort(key=_mesh_priority, reverse=True)
    placed_meshes = tuple((mesh.size, tuple(mesh.placed)) for mesh in meshes)
    placed_meshes = tuple(sorted(placed_meshes, key=lambda mesh: mesh[0], reverse=True))
    return UpstreamPlacement(score_placement(estimator, placed_meshes), placed_meshes)


def _mesh_priority(item: tuple[UpstreamMesh, float]) -> tuple[float, float]:
    return item[1], item[0].free_gb


def score_placement(
    estimator: UpstreamEstimator, meshes: Sequence[tuple[int, tuple[tuple[str, int], ...]]]
) -> float:
    """Upstream's score of a placement: throughput weighted by rates."""
    total = rates = 0.0
    for size, placed in meshes:
        if placed:
            rate = sum([estimator.models[name].rate for name, _ in placed])
            total += estimator.score_unit(size, placed)[0] * rate
            rates += rate
    return total / rates if rates else 0.0
