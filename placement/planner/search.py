"""The default search: build a placement, then take some units apart and put them together anew.

A placement is a multiset of units: which node a mesh is on does not matter, as long as all meshes
can be packed. Mesh sizes are powers of two, so that they can exactly if for every size the meshes
of that size or more leave room (`MeshBudget`); there is no enumeration of mesh groups, and the cost
of a step does not grow with the nodes.

Construction: models in order of the device time that they need, each to the unit, there or new,
where the objective gains most; once for each preferred mesh size. What a unit gains is the
difference of its own estimates before and after, and nothing else changes.

Improvement (ruin and recreate: Schrimpf et al., J. Comput. Phys. 2000): some units, those that
refuse load first, are dissolved; their devices are cut anew at random, and their models placed
again in the same way. That moves, swaps, splits, merges, grows and shrinks in one. A model that one
unit cannot serve may be cut into replicas that share its rate. What is not better is dropped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from muxjax.placement.costs.cluster import NodeGroup
from muxjax.placement.planner.scorer import Item, Items, Scorer

Unit: TypeAlias = tuple[int, int, Items, bool]
"""Index of the kind of node, devices, items, and whether degrees and shares are as MuxServe's
search has them."""

JOINED = 12
"""Units that a model may join which are looked at, the least used ones."""
_MOST_TAKEN_APART = 3
_HALVINGS = 2
"""Times that a model is halved in one rebuilding, so into four replicas at most."""
_SMALLEST_PART = 1 / 256
_SQUEEZES = 100
"""Tries to make room for a model before a placement is given up."""
_QUIET = 40
"""Steps that are made even if all load is served, for more slack."""
_MORE = 1e-9


class MeshBudget:
    """What meshes fit on nodes that are alike, and how many are there.

    Sizes divide each other, so any set of meshes can be packed as long as, for each size, those of
    that size or larger fit (Coffman, Garey and Johnson, J. Complexity 1987).
    """

    def __init__(self, group: NodeGroup) -> None:
        self.sizes = group.mesh_sizes()
        self._slots = {size: group.nodes * (group.devices // size) for size in self.sizes}
        self.counts = dict.fromkeys(self.sizes, 0)

    def fits(self, size: int, count: int = 1) -> bool:
        """Whether so many more meshes of a size fit."""
        self.counts[size] += count
        taken, fine = 0, True
        for s in reversed(self.sizes):
            # `taken` counts slots of size s.
            taken += self.counts[s]
            if taken > self._slots[s]:
                fine = False
                break
            taken *= 2
        self.counts[size] -= count
        return fine


class Placement:
    """Units, and what is left. Changed in place.

    Attributes:
      units: as they are.
      value: of all of them.
    """

    def __init__(self, scorer: Scorer, units: Iterable[Unit] = ()) -> None:
        self._scorer = scorer
        self.rooms = [MeshBudget(group) for group in scorer.cluster.groups]
        self.units: list[Unit] = []
        self.value = 0.0
        for unit in units:
            self.add(unit)

    def add(self, unit: Unit) -> None:
        """Puts a unit in."""
        self.units.append(unit)
        self.rooms[unit[0]].counts[unit[1]] += 1
        self.value += self.worth(unit)

    def remove(self, index: int) -> Unit:
        """Takes a unit out."""
        unit = self.units[index]
        self.units[index] = self.units[-1]
        self.units.pop()
        self.rooms[unit[0]].counts[unit[1]] -= 1
        self.value -= self.worth(unit)
        return unit

    def worth(self, unit: Unit) -> float:
        """The value of a unit."""
        found = self._scorer.unit(*unit)
        assert found is not None
        return found.value

    def upstream(self) -> float:
        """The sum of what MuxServe's estimator gives the units."""
        return sum([self._scorer.upstream_value(*unit) for unit in self.units])


class Search:
    """A search over placements of a fleet; repeatable by seed.

    Args:
      scorer: what units are worth.
      seed: of the random choices.
      floor: the least sum of upstream's scores that is accepted, if it can be had.
      report: told how far the search is, 0 to 1, and the best value, now and then.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        seed: int = 0,
        floor: float = 0.0,
        report: Callable[[float, float], None] = lambda done, value: None,
    ) -> None:
        self._scorer = scorer
        self._random = random.Random(seed)
        self._floor = floor * (1 - 1e-12)
        self._report = report
        self._groups = range(len(scorer.cluster.groups))
        self._needs = [self._need(model) for model in range(len(scorer.loads))]
        self._least = [self._smallest(model) for model in range(len(scorer.loads))]

    def run(self, starts: Iterable[Sequence[Unit]], steps: int) -> Placement | None:
        """The best placement that is found, or None.

        Args:
          starts: placements to begin with, beside those that are constructed; under a floor of
            upstream's, where constructed ones hardly reach it, the only ones.
          steps: of improvement.
        """
        begun = [Placement(self._scorer, units) for units in starts]
        sizes = sorted({size for g in self._scorer.cluster.groups for size in g.mesh_sizes()})
        if not self._floor:
            begun += [found for size in sizes if (found := self._construct(size)) is not None]
        if not begun:
            return None
        best = max(begun, key=self._rank)
        return self._improve(best, steps)

    def _rank(self, placement: Placement) -> tuple[float, float]:
        upstream = min(placement.upstream(), self._floor) if self._floor else 0.0
        return upstream, placement.value

    def _need(self, model: int) -> float:
        """Device seconds a second that a model takes at a good batch, roughly."""
        scorer, found = self._scorer, []
        for group in self._groups:
            for size in scorer.cluster.groups[group].mesh_sizes():
                for tp in scorer.degrees(group, size, model):
                    if tp == size:
                        curve = scorer.curve(group, size, tp, 1.0, (model, 1.0))
                        found.append(curve.rate * tp * curve.busy[6] / 64)
        return min(found, default=0.0)

    def _smallest(self, model: int) -> dict[int, int]:
        """The smallest mesh of each group that a model fits on."""
        found = {}
        for group in self._groups:
            for size in self._scorer.cluster.groups[group].mesh_sizes():
                if self._scorer.unit(group, size, ((model, 1.0),)) is not None:
                    found[group] = size
                    break
        return found

    # Construction

    def _construct(self, preferred: int) -> Placement | None:
        """A placement with meshes of one size where there is room and the models fit on it."""
        placement = Placement(self._scorer)
        items = [
            item for model in range(len(self._needs)) for item in self._cut_up(model, preferred)
        ]
        for item in sorted(items, key=lambda i: -self._needs[i[0]] * i[1]):
            if not (self._place(placement, item, preferred) or self._squeeze(placement, item)):
                return None
        return placement

    def _cut_up(self, model: int, preferred: int) -> list[Item]:
        """A model as replicas, where it needs more than a mesh: as many as its share of the
        devices has meshes at most.
        """
        best, size = 0.0, 1
        for group, least in self._least[model].items():
            room = MeshBudget(self._scorer.cluster.groups[group])
            mesh = max(least, min(preferred, room.sizes[-1]))
            found = self._scorer.unit(group, mesh, ((model, 1.0),))
            if found is not None and found.point.fractions[0] / mesh > best:
                best, size = found.point.fractions[0] / mesh, mesh
        if not best or best * size >= 1.0:
            return [(model, 1.0)]
        devices = self._scorer.cluster.num_devices * self._needs[model] / sum(self._needs)
        count = max(1, min(math.ceil(1 / (best * size)), int(devices / size)))
        return [(model, 1.0 / count)] * count

    def _squeeze(self, placement: Placement, item: Item) -> bool:
        """Makes room for an item that fits nowhere, by putting some units together anew with it."""
        for _ in range(_SQUEEZES if placement.units else 0):
            taken = self._choose(placement)
            old = [placement.remove(index) for index in sorted(taken, reverse=True)]
            new = self._rebuild(placement, old, item)
            for unit in new or old:
                placement.add(unit)
            if new:
                return True
        return False

    def _place(self, placement: Placement, item: Item, preferred: int) -> bool:
        """Puts an item on the unit, there or new, where the value grows most."""
        options = self._joins(placement, item) + self._openings(placement, item, preferred)
        if not options:
            # Nothing among the least used units; perhaps anywhere.
            options = self._joins(placement, item, every=True)
        if not options:
            return False
        _, index, unit = max(options, key=lambda option: option[0])
        if index is not None:
            placement.remove(index)
        placement.add(unit)
        return True

    def _joins(
        self, placement: Placement, item: Item, *, every: bool = False
    ) -> list[tuple[float, int | None, Unit]]:
        scorer = self._scorer
        units = placement.units
        indices: Iterable[int] = range(len(units))
        if not every and len(units) > JOINED:
            indices = sorted(indices, key=lambda i: self._use(units[i]))[:JOINED]
        options: list[tuple[float, int | None, Unit]] = []
        for index in indices:
            group, size, items, _ = units[index]
            unit = (group, size, _with(items, item), False)
            found = scorer.unit(*unit)
            if found is not None:
                options.append((found.value - placement.worth(units[index]), index, unit))
        return options

    def _use(self, unit: Unit) -> float:
        found = self._scorer.unit(*unit)
        assert found is not None
        return found.point.use / unit[1]

    def _openings(
        self, placement: Placement, item: Item, preferred: int
    ) -> list[tuple[float, int | None, Unit]]:
        options: list[tuple[float, int | None, Unit]] = []
        for group, least in self._least[item[0]].items():
            room = placement.rooms[group]
            size = max(least, min(preferred, room.sizes[-1]))
            while not room.fits(size) and size > least:
                size //= 2
            if room.fits(size):
                unit = (group, size, (item,), False)
                found = self._scorer.unit(*unit)
                if found is not None:
                    options.append((found.value, None, unit))
        return options

    # Improvement

    def _improve(self, placement: Placement, steps: int) -> Placement:
        rank = self._rank(placement)
        ceiling = sum(
            [
                w * load.rate
                for w, load in zip(self._scorer.weights, self._scorer.loads, strict=True)
            ]
        )
        for step in range(steps):
            if step % 32 == 0:
                self._report(step / steps, rank[1])
            if rank[1] >= ceiling and rank[0] >= self._floor and step >= _QUIET:
                break
            taken = self._choose(placement)
            old = [placement.remove(index) for index in sorted(taken, reverse=True)]
            value = sum([placement.worth(unit) for unit in old])
            new = self._rebuild(placement, old)
            if new is not None:
                new = self._better(placement, old, new, value, rank[0])
            if new is not None:
                for unit in new:
                    placement.add(unit)
                rank = self._rank(placement)
            else:
                for unit in old:
                    placement.add(unit)
        self._report(1.0, rank[1])
        return placement

    def _better(
        self,
        placement: Placement,
        old: Sequence[Unit],
        new: list[Unit],
        value: float,
        upstream: float,
    ) -> list[Unit] | None:
        """New units if they are better than old ones, or else None. As good is good enough: the
        search gets about. Under upstream's floor also with upstream's degrees and shares.
        """
        gain = sum([placement.worth(unit) for unit in new]) - value
        if not self._floor:
            return new if gain >= -_MORE else None
        if gain < -_MORE and upstream >= self._floor:
            return None
        scorer = self._scorer
        before = placement.upstream()
        then = before + sum([scorer.upstream_value(*unit) for unit in old])
        then = min(then, self._floor)
        for units in (new, [(*unit[:3], True) for unit in new]):
            if all(scorer.unit(*unit) for unit in units):
                gain = sum([placement.worth(unit) for unit in units]) - value
                now = before + sum([scorer.upstream_value(*unit) for unit in units])
                now = min(now, self._floor)
                if now > then + _MORE or (now >= then and gain >= -_MORE):
                    return units
        return None

    def _choose(self, placement: Placement) -> list[int]:
        """Units to take apart: one that refuses load if there is one, and others."""
        units, rand = placement.units, self._random
        count = min(len(units), rand.randint(1, _MOST_TAKEN_APART))
        lost = [self._lost(unit) for unit in units]
        total = sum(lost)
        if total > 0 and rand.random() < 0.9:
            first = rand.choices(range(len(units)), weights=lost)[0]
        else:
            first = rand.randrange(len(units))
        chosen = {first}
        while len(chosen) < count:
            chosen.add(rand.randrange(len(units)))
        return list(chosen)

    def _lost(self, unit: Unit) -> float:
        found = self._scorer.unit(*unit)
        assert found is not None
        loads, weights = self._scorer.loads, self._scorer.weights
        return sum(
            [
                loads[model].rate * part * weights[model] * (1 - fraction)
                for (model, part), fraction in zip(unit[2], found.point.fractions, strict=True)
            ]
        )

    def _rebuild(
        self, placement: Placement, old: Sequence[Unit], more: Item | None = None
    ) -> list[Unit] | None:
        """New units in place of old ones that were removed, and perhaps with one item more; None
        where that fails.
        """
        parts: dict[int, float] = {} if more is None else dict([more])
        for _, _, items, _ in old:
            for model, part in items:
                parts[model] = parts.get(model, 0.0) + part
        blocks = self._cut(placement, old, list(parts))
        if blocks is None:
            return None
        rand = self._random
        noise = rand.choice((0.0, 0.0, 0.5, 2.0))
        wild = rand.choice((0.0, 0.0, 0.2, 0.6))
        halvings = rand.choice((0, _HALVINGS))
        order = sorted(
            parts, key=lambda m: -self._needs[m] * parts[m] * (1 + noise * rand.random())
        )
        for model in order:
            if not self._insert(blocks, (model, min(1.0, round(parts[model], 9))), wild, halvings):
                return None
        return [unit for unit in blocks if unit[2]]

    def _cut(
        self, placement: Placement, old: Sequence[Unit], models: Sequence[int]
    ) -> list[Unit] | None:
        """Empty units on the devices of the old ones and on free ones, cut at random."""
        rand = self._random
        blocks: list[Unit] = []
        for group in self._groups:
            room = placement.rooms[group]
            devices = sum([size for g, size, _, _ in old if g == group])
            free = [size for size in room.sizes if room.fits(size)]
            if not free:
                continue
            counts = dict(room.counts)
            left = devices + rand.choice((0, free[-1]))
            usual = [size for g, size, _, _ in old if g == group]
            while left > 0:
                sizes = [size for size in room.sizes if size <= left and room.fits(size)]
                if not sizes:
                    break
                wanted = [size for size in sizes if size in usual]
                size = rand.choice(wanted if wanted and rand.random() < 0.5 else sizes)
                blocks.append((group, size, (), False))
                room.counts[size] += 1
                left -= size
            room.counts = counts
        for model in models:
            least = self._least[model]
            if not any(size >= least.get(group, 1 << 30) for group, size, _, _ in blocks):
                return None
        return blocks

    def _insert(self, blocks: list[Unit], item: Item, wild: float, halvings: int) -> bool:
        """Puts an item where the value grows most, or now and then anywhere; in halves where one
        block cannot serve it.
        """
        best = self._best_block(blocks, item, wild)
        if best is None:
            return False
        gain, index, unit, fraction = best
        if halvings and fraction < 1 and item[1] > _SMALLEST_PART and len(blocks) > 1:
            half = (item[0], item[1] / 2)
            first = self._best_block(blocks, half, 0.0)
            if first is not None:
                kept = blocks[first[1]]
                blocks[first[1]] = first[2]
                second = self._best_block(blocks, half, 0.0)
                blocks[first[1]] = kept
                if second is not None and second[0] + first[0] > gain + _MORE:
                    return all(self._insert(blocks, half, wild, halvings - 1) for _ in range(2))
        blocks[index] = unit
        return True

    def _best_block(
        self, blocks: Sequence[Unit], item: Item, wild: float
    ) -> tuple[float, int, Unit, float] | None:
        """Gain, place, new unit and the fraction that the item is served, of the best block; or of
        any one, with the probability `wild`.
        """
        best: tuple[float, int, Unit, float] | None = None
        most = 0.0
        seen = set()
        anywhere = wild > 0 and self._random.random() < wild
        for index, block in enumerate(blocks):
            if block in seen:
                continue
            seen.add(block)
            group, size, items, _ = block
            unit = (group, size, _with(items, item), False)
            found = self._scorer.unit(*unit)
            if found is None:
                continue
            before = self._scorer.unit(*block) if items else None
            gain = found.value - (before.value if before else 0.0)
            rank = self._random.random() if anywhere else gain
            if best is None or rank > most:
                most = rank
                place = [model for model, _ in unit[2]].index(item[0])
                best = (gain, index, unit, found.point.fractions[place])
        return best


def _with(items: Items, item: Item) -> Items:
    """Items and one more; parts of one model are joined."""
    model, part = item
    for other, other_part in items:
        if other == model:
            joined = (model, min(1.0, round(other_part + part, 9)))
            return tuple([joined if i[0] == model else i for i in items])
    return tuple(sorted((*items, item)))
