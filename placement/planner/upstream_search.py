"""MuxServe's own search, as released: Algorithm 1 with its faults, to compare with.

After `PlacementOptimizer` of hao-ai-lab/MuxServe, `muxserve/muxsched/placement.py` (2024); see
`upstream_estimator.py`. Over all combinations of a list of node splits, models are placed in order
of rate times a scale of their size, each on the mesh where the score grows most. The growth is
looked up by the mesh's position in a list that is sorted anew after every model, so that it is
often compared with another mesh's score. The number of combinations explodes with the nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from muxjax.errors import PlanError
from muxjax.placement.planner.upstream_estimator import DEVICE_GB, SIZES, Member, UpstreamEstimator

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
"""Upstream's splits of a node, in its order; 8 as 4, 2, 2, ... but not 4, 4 with other fours."""

MOST_COMBINATIONS = 200_000
_RESERVED = 0.4
_USABLE = 0.9
_PROCESS_GB = 1.6 + 6
_OVERLOAD_PERCENT = 20


@dataclass
class Mesh:
    """A mesh of upstream's: what is free on it, and who was placed with what percent."""

    size: int
    free_gb: float = 0.0
    free_percent: int = 100
    placed: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_gb = _USABLE * (1 - _RESERVED) * DEVICE_GB * self.size

    def has_room(self, member: Member, percent: int) -> bool:
        """Whether the weights fit, and the compute with some overload."""
        enough = self.free_percent + _OVERLOAD_PERCENT >= percent
        return self.free_gb >= member.weight_gb and enough

    def place(self, member: Member, percent: int) -> None:
        """Puts a model here."""
        self.placed.append((member.name, percent))
        self.free_gb -= member.weight_gb + _PROCESS_GB
        self.free_percent -= percent


@dataclass(frozen=True)
class UpstreamPlacement:
    """What upstream finds.

    Attributes:
      score: throughput weighted by rates.
      meshes: size, and name and percent of each model, the largest mesh first.
    """

    score: float
    meshes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]


def combinations(nodes: int, devices: int) -> int:
    """How many combinations of node splits upstream goes through."""
    return math.comb(len(NODE_SPLITS.get(devices, ())) + nodes - 1, nodes)


def search(estimator: UpstreamEstimator, nodes: int, devices: int) -> UpstreamPlacement | None:
    """The best placement over all combinations of node splits, or None.

    Raises:
      PlanError: nodes that upstream has no splits for, or more combinations than can be gone
        through.
    """
    if devices not in NODE_SPLITS:
        raise PlanError(
            f"upstream's search has no splits of a node of {devices}; there are those of "
            f"{', '.join(map(str, NODE_SPLITS))} devices"
        )
    count = combinations(nodes, devices)
    if count > MOST_COMBINATIONS:
        raise PlanError(
            f"upstream's search goes through {count:.1e} combinations for {nodes} nodes of "
            f"{devices}; plan without --upstream-compatible"
        )
    members = _sorted(list(estimator.members.values()))
    least = max(
        min((size for size in SIZES if estimator.candidate(m.name, size)), default=SIZES[-1])
        for m in members
    )
    best: UpstreamPlacement | None = None
    for splits in itertools.combinations_with_replacement(NODE_SPLITS[devices], nodes):
        sizes = [size for split in splits for size in split]
        if max(sizes) < least or len(sizes) > len(members):
            continue
        found = _place_all(estimator, members, sizes)
        if found is not None and (best is None or found.score > best.score):
            best = found
    return best


def _sorted(members: list[Member]) -> list[Member]:
    by_base = sorted(members, key=lambda m: (m.rate * m.base_devices, m.base_devices), reverse=True)
    return sorted(by_base, key=lambda m: (m.rate * m.rate_scale, m.rate_scale), reverse=True)


def _place_all(
    estimator: UpstreamEstimator, members: Sequence[Member], sizes: Sequence[int]
) -> UpstreamPlacement | None:
    """Algorithm 1 on one group of meshes, with upstream's bookkeeping."""
    meshes = [Mesh(size) for size in sizes]
    order = [(mesh, 0.0) for mesh in meshes]
    order.sort(key=_need, reverse=True)
    by_position = [0.0] * len(meshes)
    for m in members:
        best, most, percent = -1, -100.0, 0
        for i, (mesh, _) in enumerate(order):
            candidate = estimator.candidate(m.name, mesh.size)
            if candidate is None or not mesh.has_room(m, candidate.percent):
                continue
            placed = (*mesh.placed, (m.name, candidate.percent))
            increase = estimator.unit(mesh.size, placed)[0] - by_position[i]
            if increase > most:
                best, most, percent = i, increase, candidate.percent
            elif increase == most and mesh.size < meshes[best].size:
                best, percent = i, candidate.percent
        if best < 0:
            return None
        mesh, tag = order[best]
        mesh.place(m, percent)
        order[best] = mesh, tag - m.rate * m.rate_scale / mesh.size
        by_position[best] += most
        order.sort(key=_need, reverse=True)
    found = tuple((mesh.size, tuple(mesh.placed)) for mesh in meshes)
    found = tuple(sorted(found, key=lambda mesh: mesh[0], reverse=True))
    return UpstreamPlacement(score(estimator, found), found)


def _need(item: tuple[Mesh, float]) -> tuple[float, float]:
    return item[1], item[0].free_gb


def score(
    estimator: UpstreamEstimator, meshes: Sequence[tuple[int, tuple[tuple[str, int], ...]]]
) -> float:
    """Upstream's score of a placement: throughput weighted by rates."""
    total = rates = 0.0
    for size, placed in meshes:
        if placed:
            rate = sum([estimator.members[name].rate for name, _ in placed])
            total += estimator.unit(size, placed)[0] * rate
            rates += rate
    return total / rates if rates else 0.0
