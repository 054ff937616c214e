"""A placement under construction: candidate units and the meshes that still fit on the nodes.

A placement is a multiset of units. Meshes are not assigned to nodes; `MeshBudget` only ensures that
they can be packed.
"""

from __future__ import annotations

from collections.abc import Iterable

from muxjax.placement.costs.cluster import NodeGroup
from muxjax.placement.planner.scorer import CandidateUnit, Scorer


class MeshBudget:
    """Counts meshes on a group of equal nodes and checks whether more fit.

    Mesh sizes are powers of two. Meshes can be packed exactly if, for each size, all meshes of at
    least that size fit (Coffman, Garey and Johnson, J. Complexity 1987).

    Attributes:
      sizes: possible mesh sizes, ascending.
      counts: number of meshes by size.
    """

    def __init__(self, group: NodeGroup) -> None:
        self.sizes = group.mesh_sizes()
        self._slots = {size: group.nodes * (group.devices // size) for size in self.sizes}
        self.counts = dict.fromkeys(self.sizes, 0)

    def fits(self, size: int, count: int = 1) -> bool:
        """Whether `count` more meshes of `size` devices fit."""
        self.counts[size] += count
        used, fits = 0, True
        for s in reversed(self.sizes):
            # `used` counts slots of size s.
            used += self.counts[s]
            if used > self._slots[s]:
                fits = False
                break
            used *= 2
        self.counts[size] -= count
        return fits


class Placement:
    """A mutable set of units with its value.

    Attributes:
      units: the units, unordered.
      value: sum of the values of all units.
      budgets: a mesh budget for each group of nodes.
    """

    def __init__(self, scorer: Scorer, units: Iterable[CandidateUnit] = ()) -> None:
        self._scorer = scorer
        self.budgets = [MeshBudget(group) for group in scorer.cluster.groups]
        self.units: list[CandidateUnit] = []
        self.value = 0.0
        for unit in units:
            self.add(unit)

    def add(self, unit: CandidateUnit) -> None:
        """Adds a feasible unit."""
        self.units.append(unit)
        self.budgets[unit.group].counts[unit.size] += 1
        self.value += self.unit_value(unit)

    def remove(self, index: int) -> CandidateUnit:
        """Removes and returns a unit. The last unit moves to its index."""
        unit = self.units[index]
        self.units[index] = self.units[-1]
        self.units.pop()
        self.budgets[unit.group].counts[unit.size] -= 1
        self.value -= self.unit_value(unit)
        return unit

    def unit_value(self, unit: CandidateUnit) -> float:
        """The value of a feasible unit."""
        return self._scorer.feasible_score(unit).value

    def upstream_value(self) -> float:
        """Sum of the units' values by MuxServe's estimator."""
        return sum([self._scorer.upstream_value(*unit) for unit in self.units])
