"""Greedy construction of a placement as the start of a search.

Models are placed in descending order of their device time, each on the existing or new unit that
increases the objective most. The gain of a unit is the difference of its scores; no other unit
changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from muxjax.placement.planner.placements import MeshBudget, Placement
from muxjax.placement.planner.rebuild import Rebuilder, add_item
from muxjax.placement.planner.scorer import CandidateUnit, Item, Scorer

MAX_JOINED = 12
"""Maximum number of existing units that are scored for a model, the least utilized first."""
_REBUILDS = 100
"""Attempts to make room for a model before construction fails."""


class GreedyConstructor:
    """Builds placements with a preferred mesh size.

    Args:
      scorer: scores of units.
      rebuilder: makes room for a model that fits on no unit.
    """

    def __init__(self, scorer: Scorer, rebuilder: Rebuilder) -> None:
        self._scorer = scorer
        self._rebuilder = rebuilder

    def construct(self, preferred: int) -> Placement | None:
        """Builds a placement with meshes of `preferred` devices, or smaller if these do not fit.

        Returns:
          The placement, or None if a model could not be placed.
        """
        placement = Placement(self._scorer)
        demands = self._rebuilder.demands
        items = [
            item
            for model in range(len(demands))
            for item in self._split_into_replicas(model, preferred)
        ]
        for item in sorted(items, key=lambda i: -demands[i[0]] * i[1]):
            if not (self._place(placement, item, preferred) or self._make_room(placement, item)):
                return None
        return placement

    def _split_into_replicas(self, model: int, preferred: int) -> list[Item]:
        """Splits a model that needs more than one mesh into equal replicas.

        The model's fair share of the devices limits their number.
        """
        demands = self._rebuilder.demands
        best, size = 0.0, 1
        for group, smallest in self._rebuilder.smallest_mesh[model].items():
            budget = MeshBudget(self._scorer.cluster.groups[group])
            mesh = max(smallest, min(preferred, budget.sizes[-1]))
            score = self._scorer.score(group, mesh, ((model, 1.0),))
            if score is not None and score.point.served[0] / mesh > best:
                best, size = score.point.served[0] / mesh, mesh
        if not best or best * size >= 1.0:
            return [(model, 1.0)]
        devices = self._scorer.cluster.num_devices * demands[model] / sum(demands)
        count = max(1, min(math.ceil(1 / (best * size)), int(devices / size)))
        return [(model, 1.0 / count)] * count

    def _make_room(self, placement: Placement, item: Item) -> bool:
        """Rebuilds some units to place an item that fits on no unit."""
        for _ in range(_REBUILDS if placement.units else 0):
            chosen = self._rebuilder.choose_units(placement)
            old = [placement.remove(index) for index in sorted(chosen, reverse=True)]
            new = self._rebuilder.rebuild(placement, old, item)
            for unit in new or old:
                placement.add(unit)
            if new:
                return True
        return False

    def _place(self, placement: Placement, item: Item, preferred: int) -> bool:
        """Places an item on the existing or new unit where the value grows most."""
        options = self._existing_units(placement, item)
        options += self._new_units(placement, item, preferred)
        if not options:
            options = self._existing_units(placement, item, limit=None)
        if not options:
            return False
        _, index, unit = max(options, key=lambda option: option[0])
        if index is not None:
            placement.remove(index)
        placement.add(unit)
        return True

    def _existing_units(
        self, placement: Placement, item: Item, *, limit: int | None = MAX_JOINED
    ) -> list[tuple[float, int | None, CandidateUnit]]:
        """Gain, index and new unit of each existing unit that an item can join."""
        units = placement.units
        indices: Iterable[int] = range(len(units))
        if limit is not None and len(units) > limit:
            indices = sorted(indices, key=lambda i: self._utilization(units[i]))[:limit]
        options: list[tuple[float, int | None, CandidateUnit]] = []
        for index in indices:
            group, size, items, _ = units[index]
            unit = CandidateUnit(group, size, add_item(items, item))
            score = self._scorer.score(*unit)
            if score is not None:
                options.append((score.value - placement.unit_value(units[index]), index, unit))
        return options

    def _utilization(self, unit: CandidateUnit) -> float:
        return self._scorer.feasible_score(unit).point.utilization / unit.size

    def _new_units(
        self, placement: Placement, item: Item, preferred: int
    ) -> list[tuple[float, int | None, CandidateUnit]]:
        """Gain and unit of a new mesh for an item, for each group of nodes with free devices."""
        options: list[tuple[float, int | None, CandidateUnit]] = []
        for group, smallest in self._rebuilder.smallest_mesh[item[0]].items():
            budget = placement.budgets[group]
            size = max(smallest, min(preferred, budget.sizes[-1]))
            while not budget.fits(size) and size > smallest:
                size //= 2
            if budget.fits(size):
                unit = CandidateUnit(group, size, (item,))
                score = self._scorer.score(*unit)
                if score is not None:
                    options.append((score.value, None, unit))
        return options
