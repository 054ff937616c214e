"""Requests that can no longer be in time: they let others go first, and fill what those leave.

A request that would miss its target even if it began now is deferred, once. Where more comes than
can be served this is what keeps the others in time: prompts that stand in line until the last
moment, and a little longer than was thought, are all late.

While they are few, they come back as soon as their model has no others waiting. Where they become
many, more comes than can be served: then they wait until none that may be in time is left among the
models that hold each other up. Brought back earlier they take the time of those: of three small
models at saturation 2.5 times as much was in time as under `static` and `temporal`, and 3.7 to 5.2
times this way (`docs/scheduling.md`). Two things keep that from starving anybody:

- for every `TURNS` requests that end one comes back, whichever came first;
- of a model with hardly any of them (`MINOR_PART`), which is not who has too many, they come back
  at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxjax.scheduling.policies.slo_tracker import SloTracker
from muxjax.scheduling.policies.slo_utilization import SloUtilization
from muxjax.scheduling.scheduler import Scheduler

TURNS = 20
"""With 10, the others lose 5 points of attainment at saturation. This and what follows: three small
models, one profile of their steps, six seeds."""
FEW, FEW_PART = 4, 0.25
"""So many are few, and so many for each sequence that runs. With 8, 5 points fewer were in time at
three quarters of what saturates; with 2, some waited for a second at half."""
MINOR_PART = 1 / 16
"""With an eighth, 13 points are lost at saturation."""


class DeferralQueue:
    """Those of models that hold each other up.

    Args:
      paces: the models.
    """

    def __init__(self, paces: Sequence[SloTracker]) -> None:
        self._paces = paces
        self._turns = 0

    def look(self, unit: Scheduler, strain: SloUtilization, now: float) -> None:
        """Defers lost causes among those that are next, and brings deferred requests back.

        Args:
          unit: whose models they are.
          strain: says what may begin.
          now: seconds.
        """
        count = 0
        for pace in self._paces:
            if pace.state.first is not None:
                pace.defer_lost(unit, now)
            count += len(pace.state.deferred)
        if count:
            self._bring_back(unit, strain, count, now)

    def _bring_back(self, unit: Scheduler, strain: SloUtilization, count: int, now: float) -> None:
        deferred = [pace for pace in self._paces if pace.state.deferred]
        turns = sum([pace.state.finished for pace in self._paces]) // TURNS
        if turns > self._turns:
            firsts = [next(iter(pace.state.deferred.values())) for pace in deferred]
            unit.recall(min(firsts, key=lambda request: request.arrival).model)
        self._turns = turns
        running = sum([len(pace.state.running) for pace in self._paces])
        many = count > max(FEW, FEW_PART * running)
        wait = many and any(_may_be_in_time(pace, now) for pace in self._paces)
        for pace in deferred:
            state = pace.state
            if state.waiting or (wait and len(state.deferred) > MINOR_PART * count):
                continue
            most = min(state.spec.limits.max_prefill_seqs, len(state.deferred))
            while most and not strain.allows(pace, unit, most):
                most //= 2
            for _ in range(most):
                unit.recall(state.spec.name)


def _may_be_in_time(pace: SloTracker, now: float) -> bool:
    """Whether a model has requests that were not called lost causes, and are here no longer than
    those of mean length may be: nobody is to wait for the end of a very long one.
    """
    state, since = pace.state, now - pace.allowed()
    groups = state.waiting, state.prefilling, state.running
    return any(
        not one.deferred and one.arrival > since for group in groups for one in group.values()
    )
