"""Rebuilds part of a placement: replaces dissolved units by new units for the same models.

The devices of the old units are partitioned at random into new meshes. Each model is then placed
where the value grows most. One operation covers moves, swaps, splits, merges, growth and shrinking.
A model that one unit cannot serve may be split into replicas that share its rate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.scorer import CandidateUnit, Item, Items, Scorer

_MAX_DISSOLVED = 3
"""Maximum number of units dissolved at once."""
_HALVINGS = 2
"""Maximum halvings of a model in one rebuild (four replicas)."""
_SMALLEST_PART = 1 / 256
"""Smallest part of a model, as a fraction of its rate; parts up to this size are not halved."""
_UNDERSERVED_FIRST = 0.9
"""Probability that the first unit chosen is one that refuses load."""
_NO_MESH = 1 << 30
MIN_GAIN = 1e-9
"""Smaller differences of values count as equal."""


class Rebuilder:
    """Chooses units to dissolve and builds their replacements.

    Args:
      scorer: scores of units.
      rng: source of all random choices.

    Attributes:
      demands: device seconds per second of each model at a batch of 64 (an approximation).
      smallest_mesh: smallest feasible mesh size of each model, by group of nodes.
    """

    def __init__(self, scorer: Scorer, rng: random.Random) -> None:
        self._scorer = scorer
        self._rng = rng
        self._groups = range(len(scorer.cluster.groups))
        self.demands = [self._demand(model) for model in range(len(scorer.loads))]
        self.smallest_mesh = [self._smallest_mesh(model) for model in range(len(scorer.loads))]

    def _demand(self, model: int) -> float:
        scorer, demands = self._scorer, []
        for group in self._groups:
            for size in scorer.cluster.groups[group].mesh_sizes():
                for tp in scorer.tp_sizes(group, size, model):
                    if tp == size:
                        curve = scorer.curve(group, size, tp, 1.0, (model, 1.0))
                        demands.append(curve.rate * tp * curve.mesh_time[6] / 64)  # batch 2**6
        return min(demands, default=0.0)

    def _smallest_mesh(self, model: int) -> dict[int, int]:
        smallest = {}
        for group in self._groups:
            for size in self._scorer.cluster.groups[group].mesh_sizes():
                if self._scorer.score(group, size, ((model, 1.0),)) is not None:
                    smallest[group] = size
                    break
        return smallest

    def choose_units(self, placement: Placement, lost: Sequence[float] | None = None) -> list[int]:
        """Chooses the indices of units to dissolve: mostly one that loses requests, others random.

        Args:
          placement: the placement.
          lost: what each unit loses, as weights of the choice; None: the load that it refuses.
        """
        units, rng = placement.units, self._rng
        count = min(len(units), rng.randint(1, _MAX_DISSOLVED))
        if lost is None:
            lost = [self._scorer.refused_value(unit) for unit in units]
        if sum(lost) > 0 and rng.random() < _UNDERSERVED_FIRST:
            first = rng.choices(range(len(units)), weights=lost)[0]
        else:
            first = rng.randrange(len(units))
        chosen = {first}
        while len(chosen) < count:
            chosen.add(rng.randrange(len(units)))
        return list(chosen)

    def rebuild(
        self, placement: Placement, old: Sequence[CandidateUnit], extra: Item | None = None
    ) -> list[CandidateUnit] | None:
        """Builds the replacements of removed units.

        Args:
          placement: the placement without the old units; not changed.
          old: the removed units.
          extra: an additional item to place.

        Returns:
          The new units, or None if the models could not be placed.
        """
        parts: dict[int, float] = {} if extra is None else dict([extra])
        for unit in old:
            for model, part in unit.items:
                parts[model] = parts.get(model, 0.0) + part
        blocks = self._partition_devices(placement, old, list(parts))
        if blocks is None:
            return None
        rng = self._rng
        noise = rng.choice((0.0, 0.0, 0.5, 2.0))
        random_placement = rng.choice((0.0, 0.0, 0.2, 0.6))
        halvings = rng.choice((0, _HALVINGS))
        order = sorted(
            parts, key=lambda m: -self.demands[m] * parts[m] * (1 + noise * rng.random())
        )
        for model in order:
            item = (model, min(1.0, round(parts[model], 9)))
            if not self._insert(blocks, item, random_placement, halvings):
                return None
        return [block for block in blocks if block.items]

    def _partition_devices(
        self, placement: Placement, old: Sequence[CandidateUnit], models: Sequence[int]
    ) -> list[CandidateUnit] | None:
        """Empty units of random sizes on the devices of the old units and some free devices."""
        rng = self._rng
        blocks: list[CandidateUnit] = []
        for group in self._groups:
            budget = placement.budgets[group]
            old_sizes = [unit.size for unit in old if unit.group == group]
            free = [size for size in budget.sizes if budget.fits(size)]
            if not free:
                continue
            counts = dict(budget.counts)
            left = sum(old_sizes) + rng.choice((0, free[-1]))
            while left > 0:
                sizes = [size for size in budget.sizes if size <= left and budget.fits(size)]
                if not sizes:
                    break
                preferred = [size for size in sizes if size in old_sizes]
                size = rng.choice(preferred if preferred and rng.random() < 0.5 else sizes)
                blocks.append(CandidateUnit(group, size, ()))
                budget.counts[size] += 1
                left -= size
            budget.counts = counts
        for model in models:
            smallest = self.smallest_mesh[model]
            if not any(block.size >= smallest.get(block.group, _NO_MESH) for block in blocks):
                return None
        return blocks

    def _insert(
        self, blocks: list[CandidateUnit], item: Item, random_placement: float, halvings: int
    ) -> bool:
        """Adds an item to the best block, or in halves if one block cannot serve it in full."""
        best = self._best_block(blocks, item, random_placement)
        if best is None:
            return False
        gain, index, unit, served = best
        if halvings and served < 1 and item[1] > _SMALLEST_PART and len(blocks) > 1:
            half = (item[0], item[1] / 2)
            first = self._best_block(blocks, half, 0.0)
            if first is not None:
                original = blocks[first[1]]
                blocks[first[1]] = first[2]
                second = self._best_block(blocks, half, 0.0)
                blocks[first[1]] = original
                if second is not None and second[0] + first[0] > gain + MIN_GAIN:
                    return all(
                        self._insert(blocks, half, random_placement, halvings - 1) for _ in range(2)
                    )
        blocks[index] = unit
        return True

    def _best_block(
        self, blocks: Sequence[CandidateUnit], item: Item, random_placement: float
    ) -> tuple[float, int, CandidateUnit, float] | None:
        """Finds the block where an item adds most value.

        With probability `random_placement` a random feasible block is chosen instead.

        Returns:
          The gain, the block's index, the unit with the item, and the served fraction of the item.
        """
        best: tuple[float, int, CandidateUnit, float] | None = None
        highest = 0.0
        seen = set()
        at_random = random_placement > 0 and self._rng.random() < random_placement
        for index, block in enumerate(blocks):
            if block in seen:
                continue
            seen.add(block)
            unit = CandidateUnit(block.group, block.size, add_item(block.items, item))
            score = self._scorer.score(*unit)
            if score is None:
                continue
            before = self._scorer.score(*block) if block.items else None
            gain = score.value - (before.value if before else 0.0)
            rank = self._rng.random() if at_random else gain
            if best is None or rank > highest:
                highest = rank
                position = [model for model, _ in unit.items].index(item[0])
                best = (gain, index, unit, score.point.served[position])
        return best


def add_item(items: Items, item: Item) -> Items:
    """Adds an item to sorted items, merging parts of the same model."""
    model, part = item
    for other, other_part in items:
        if other == model:
            joined = (model, min(1.0, round(other_part + part, 9)))
            return tuple([joined if i[0] == model else i for i in items])
    return tuple(sorted((*items, item)))
