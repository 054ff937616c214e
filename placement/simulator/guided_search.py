"""Search for the placement with the highest simulated SLO attainment.

The planner's steady-state estimate counts means. It does not see the queues of a unit at 97 %
utilization, nor a short request that waits behind a long prefill. This search starts from
placements that the planner finds with spare capacity, simulates their units, and then rebuilds the
units that lose requests (ruin and recreate, as in `planner/search.py`). A step is accepted if the
placement loses no more requests in simulation. A step costs the simulation of the new units, and of
the units that share models with them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from muxjax.placement.planner.placements import Placement
from muxjax.placement.planner.planner import PlannerOptions, search_units
from muxjax.placement.planner.rebuild import MIN_GAIN, Rebuilder
from muxjax.placement.planner.scorer import CandidateUnit, Scorer
from muxjax.placement.simulator.group_attainment import (
    GroupSimulator,
    UnitGroup,
    group_units,
)

SPARE_CAPACITIES = (1.5, 2.2)
"""Factors on the expected rates for which further starts are planned."""
SIMULATED_REQUESTS = 30_000
"""Requests that a search simulates at most, times `PlannerOptions.effort`."""
TARGET_ATTAINMENT = 0.995
"""Attainment at which the search ends."""
MAX_STEPS = 600
"""Maximum number of steps, times `PlannerOptions.effort`."""
_MAX_LOST = 1e9
"""Weight of a unit that cannot be simulated, whose loss is infinite."""


def search_by_simulation(
    scorer: Scorer,
    simulator: GroupSimulator,
    options: PlannerOptions,
    starts: Sequence[Sequence[CandidateUnit]],
    report: Callable[[float, float], None] = lambda progress, attainment: None,
) -> list[CandidateUnit]:
    """Searches for the placement with the highest simulated attainment.

    Args:
      scorer: of the fleet at its expected rates; its objective is not used.
      simulator: simulates groups of units.
      options: effort and seed.
      starts: placements to start from, at least one; some with spare capacity are added.
      report: called with the progress, 0 to 1, and the attainment so far.
    """
    scaled = [_with_spare_capacity(scorer, factor) for factor in SPARE_CAPACITIES]
    scorers = [scorer, *scaled]
    candidates = [*starts, *[search_units(other, options) for other in scaled]]
    total = scorer.total_rate or 1.0
    losses = []
    for index, units in enumerate(candidates):
        losses.append(simulator.placement_loss(units))
        report(0.2 * (index + 1) / len(candidates), 1 - min(losses) / total)
    best = list(candidates[losses.index(min(losses))])
    return _improve(scorer, scorers, simulator, options, best, report)


def _improve(
    scorer: Scorer,
    scorers: Sequence[Scorer],
    simulator: GroupSimulator,
    options: PlannerOptions,
    units: list[CandidateUnit],
    report: Callable[[float, float], None],
) -> list[CandidateUnit]:
    rng = random.Random(options.seed)
    rebuilders = [Rebuilder(scaled, rng) for scaled in scorers]
    placement = Placement(scorer, units)
    total = scorer.total_rate or 1.0
    budget = simulator.requests + options.effort * SIMULATED_REQUESTS
    first = simulator.requests
    steps = round(options.effort * MAX_STEPS)
    for step in range(steps):
        groups = group_units(placement.units)
        losses = {group: simulator.loss(group) for group in groups}
        attainment = 1 - sum([losses[group].total for group in groups]) / total
        done = max(step / steps, (simulator.requests - first) / max(1.0, budget - first))
        report(0.2 + 0.8 * min(1.0, done), attainment)
        if attainment >= TARGET_ATTAINMENT or simulator.requests >= budget:
            break
        by_unit = {
            unit: min(lost, _MAX_LOST)
            for group in groups
            for unit, lost in zip(group, losses[group].by_unit, strict=True)
        }
        rebuilder = rng.choice(rebuilders)
        chosen = rebuilder.choose_units(placement, [by_unit[unit] for unit in placement.units])
        old = [placement.remove(index) for index in sorted(chosen, reverse=True)]
        new = rebuilder.rebuild(placement, old)
        if new is None or not _is_better(scorer, simulator, groups, placement.units, new):
            new = old
        for unit in new:
            placement.add(unit)
    report(1.0, attainment)
    return placement.units


def _is_better(
    scorer: Scorer,
    simulator: GroupSimulator,
    old_groups: Sequence[UnitGroup],
    kept: Sequence[CandidateUnit],
    new: Sequence[CandidateUnit],
) -> bool:
    """Whether a placement of kept and new units loses at most as many requests as the old one."""
    if any(scorer.score(*unit) is None for unit in new):
        return False
    before, after = Counter(old_groups), Counter(group_units([*kept, *new]))
    allowed = sum([simulator.loss(group).total for group in (before - after).elements()])
    allowed += MIN_GAIN
    # Load that is refused on average is lost in any simulation: most candidates end here.
    if sum([scorer.refused_value(unit) for unit in new]) > allowed:
        return False
    for group in (after - before).elements():
        result = simulator.loss_within(group, allowed)
        if result is None:
            return False
        allowed -= result.total
    return True


def _with_spare_capacity(scorer: Scorer, factor: float) -> Scorer:
    """A scorer of the same fleet with all rates multiplied, so that its plans have slack."""
    loads = [
        replace(load, expected=replace(load.expected, rate=load.expected.rate * factor))
        for load in scorer.loads
    ]
    return Scorer(
        loads, scorer.cluster, scorer.costs, scorer.execution, "throughput", scorer.upstream
    )
