"""The default search: greedy construction, then ruin and recreate.

Construction (`construction.py`) builds one placement for each preferred mesh size. The search
improves the best of the constructed and given placements. An improvement step (Schrimpf et al., J.
Comput. Phys. 2000) dissolves some units, preferably those that refuse load, and rebuilds them
(`rebuild.py`). Worse results are discarded. No step enumerates the nodes, so the duration of a step
does not depend on their number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from muxjax.placement.planner.construction import GreedyConstructor
from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.rebuild import MIN_GAIN, Rebuilder
from muxjax.placement.planner.scorer import CandidateUnit, Scorer

_MIN_STEPS = 40
"""Minimum number of steps, to increase the slack even if all load is served."""
_REPORT_INTERVAL = 32
"""Steps between progress reports."""


class Search:
    """Searches placements of a fleet; deterministic for a seed.

    Args:
      scorer: scores of units.
      seed: of the random choices.
      floor: minimum `Placement.upstream_value` of a result, if it can be reached.
      report: called with the progress, 0 to 1, and the best value so far.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        seed: int = 0,
        floor: float = 0.0,
        report: Callable[[float, float], None] = lambda progress, value: None,
    ) -> None:
        self._scorer = scorer
        self._floor = floor * (1 - 1e-12)
        self._report = report
        self._rebuilder = Rebuilder(scorer, random.Random(seed))
        self._constructor = GreedyConstructor(scorer, self._rebuilder)

    def run(self, starts: Iterable[Sequence[CandidateUnit]], steps: int) -> Placement | None:
        """Searches for the best placement.

        Args:
          starts: placements to start from. Constructed placements are added, except with a floor,
            which they rarely reach.
          steps: maximum number of improvement steps.

        Returns:
          The best placement, or None without any start.
        """
        candidates = [Placement(self._scorer, units) for units in starts]
        sizes = sorted({size for g in self._scorer.cluster.groups for size in g.mesh_sizes()})
        if not self._floor:
            constructed = [self._constructor.construct(size) for size in sizes]
            candidates += [placement for placement in constructed if placement is not None]
        if not candidates:
            return None
        best = max(candidates, key=self._rank)
        return self._improve(best, steps)

    def _rank(self, placement: Placement) -> tuple[float, float]:
        upstream = min(placement.upstream_value(), self._floor) if self._floor else 0.0
        return upstream, placement.value

    def _improve(self, placement: Placement, steps: int) -> Placement:
        rank = self._rank(placement)
        offered = sum(
            [w * rate for w, rate in zip(self._scorer.weights, self._scorer.rates, strict=True)]
        )
        for step in range(steps):
            if step % _REPORT_INTERVAL == 0:
                self._report(step / steps, rank[1])
            if rank[1] >= offered and rank[0] >= self._floor and step >= _MIN_STEPS:
                break
            chosen = self._rebuilder.choose_units(placement)
            old = [placement.remove(index) for index in sorted(chosen, reverse=True)]
            value = sum([placement.unit_value(unit) for unit in old])
            new = self._rebuilder.rebuild(placement, old)
            if new is not None:
                new = self._accepted(placement, old, new, value, rank[0])
            if new is not None:
                for unit in new:
                    placement.add(unit)
                rank = self._rank(placement)
            else:
                for unit in old:
                    placement.add(unit)
        self._report(1.0, rank[1])
        return placement

    def _accepted(
        self,
        placement: Placement,
        old: Sequence[CandidateUnit],
        new: list[CandidateUnit],
        old_value: float,
        old_upstream: float,
    ) -> list[CandidateUnit] | None:
        """Returns the new units if they are at least as good as the old units, else None.

        Equal values are accepted, so the search can cross a plateau. With a floor, the new units
        are also tried with MuxServe's `tp` sizes and compute shares.
        """
        gain = sum([placement.unit_value(unit) for unit in new]) - old_value
        if not self._floor:
            return new if gain >= -MIN_GAIN else None
        if gain < -MIN_GAIN and old_upstream >= self._floor:
            return None
        scorer = self._scorer
        rest = placement.upstream_value()
        before = rest + sum([scorer.upstream_value(*unit) for unit in old])
        before = min(before, self._floor)
        for units in (new, [unit._replace(as_upstream=True) for unit in new]):
            if all(scorer.score(*unit) for unit in units):
                gain = sum([placement.unit_value(unit) for unit in units]) - old_value
                after = rest + sum([scorer.upstream_value(*unit) for unit in units])
                after = min(after, self._floor)
                if after > before + MIN_GAIN or (after >= before and gain >= -MIN_GAIN):
                    return units
        return None
